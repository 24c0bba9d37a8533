"""`quota.LLM`: the engine from Python."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import quota
from quota import LLM, SamplingParams
from quota.core.errors import CheckpointError, ImageError, RecipeError, UsageError
from quota.core.formats import DEFAULT
from quota.core.recipe import Recipe
from quota.eval.asking import ask
from quota.runtime.engine import Prompt, Request
from quota.runtime.llm import Completion, why_not
from quota.runtime.patch import patched
from tests.prune.recipes import recipe_for
from tests.speaking import served, speaking

FEW = SamplingParams(max_tokens=6)


@pytest.fixture(scope="module")
def model() -> Any:
    return served("llava")


@pytest.fixture(scope="module")
def recipe(model: Any) -> Recipe:
    return recipe_for(model)


@pytest.fixture(scope="module")
def llm(model: Any, recipe: Recipe) -> LLM:
    return LLM(model, recipe={"pruned": recipe}, page_tokens=4)


def picture(seed: int, size: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def plain(model: Any, recipe: Recipe | None, text: str, images: list[Image.Image], tokens: int = 6) -> tuple[str, Any]:
    """What the transformers model says: (text, visual tokens alive in each layer)."""
    if recipe is None:
        answer = ask(model, model.processor, text, images, max_new_tokens=tokens)
    else:
        with patched(model, recipe):
            answer = ask(model, model.processor, text, images, max_new_tokens=tokens)
    return answer.text, tuple(answer.figures()["visual_tokens_by_layer"])


def test_a_list_is_answered_as_generate_answers_each(model: Any, recipe: Recipe, llm: LLM) -> None:
    asked = [(f"what is {n} ?", picture(n)) for n in range(5)] + [("star ?", [picture(8), picture(9)]), "what is it ?"]
    for chosen, own in (("default", recipe), ("pruned", recipe), (None, None), ("none", None)):
        made = llm.generate(asked, FEW, recipe=chosen)
        for one, completion in zip(asked, made, strict=True):
            text, images = (one, []) if isinstance(one, str) else one
            images = images if isinstance(images, list) else [images]
            assert (completion.text.strip(), completion.usage.visual_by_layer) == plain(model, own, text, images)
    llm.engine.check_integrity()


def test_one_prompt_gives_one_completion_in_every_form(llm: LLM, tmp_path: Path) -> None:
    image = picture(1)
    image.save(tmp_path / "a.png")
    data = io.BytesIO()
    image.save(data, "PNG")
    url = "data:image/png;base64," + __import__("base64").b64encode(data.getvalue()).decode()
    first = llm.generate(("what is it ?", image), FEW)
    assert isinstance(first, Completion) and first.reason in ("stop", "length") and 1 <= len(first.tokens) <= 6
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), data.getvalue(), url, np.asarray(image)):
        assert llm.generate(("what is it ?", [given]), FEW).tokens == first.tokens
    assert llm.generate({"prompt": "what is it ?", "images": image}, FEW).tokens == first.tokens
    part = {"type": "image_url", "image_url": {"url": url}}
    message = {"role": "user", "content": [part, {"type": "text", "text": "what is it ?"}]}
    assert llm.chat([message], FEW).tokens == first.tokens
    assert [c.tokens for c in llm.chat([[message], [message]], FEW)] == [first.tokens] * 2
    other = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it ?"}]}
    assert llm.generate([[other], "what is it ?"], FEW)[0].tokens == first.tokens
    prompt = llm.prompts.question("what is it ?", [image])
    assert isinstance(prompt, Prompt) and llm.generate(prompt, FEW).tokens == first.tokens
    assert llm.generate([], FEW) == []


def test_a_preview_counts_what_a_run_does(llm: LLM, recipe: Recipe) -> None:
    asked = ("what is it ?", [picture(1), picture(2)])
    for budget in ({}, {"recipe": None}, {"keep": 0.5}, {"keep_tokens": 2}, {"recipe": recipe, "keep_tokens": 3}):
        steps = llm.engine.stats.steps
        found = llm.preview(asked, **budget)
        assert llm.engine.stats.steps == steps
        usage = llm.generate(asked, FEW, **budget).usage
        assert (found.prompt_tokens, found.visual_by_layer) == (usage.prompt_tokens, usage.visual_by_layer), budget
        assert (found.kv_bytes < found.unpruned_kv_bytes) == (budget.get("recipe", "") is not None)


def test_a_stream_joins_to_the_answer_and_may_be_left(llm: LLM) -> None:
    asked = [(f"what is {n} ?", picture(n)) for n in range(3)]
    whole = llm.generate(asked, FEW)
    texts = ["", "", ""]
    ends = 0
    for output in llm.stream(asked, FEW):
        texts[int(output.id)] += output.text
        ends += output.reason is not None
    assert texts == [c.text for c in whole] and ends == 3
    for output in llm.stream(asked[0], FEW):
        assert output.id == "0"
        break
    one, two = llm.stream(asked[0], FEW), llm.stream(asked[1], FEW)  # in turns
    pairs = list(zip(one, two, strict=False))
    assert pairs and "".join(a.text for a, _ in pairs) == whole[0].text[: sum(len(a.text) for a, _ in pairs)]
    one.close(), two.close()
    assert llm.generate(asked, FEW) == whole, "what was left does not disturb what comes"
    assert not llm.engine.busy and not llm._inboxes


def test_a_long_list_is_fed_as_there_is_room(model: Any) -> None:
    """Prompts hold pixels: only as many are made as can run."""
    llm, made, most = LLM(model, max_running=3, page_tokens=4), 0, 0
    finished = 0

    def requests() -> Any:
        nonlocal made, most
        for number in range(12):
            made += 1
            most = max(most, made - finished)
            yield Request("", llm.prompts.question(f"what is {number} ?", [picture(number)]), FEW)

    answers = []
    for completion in llm.run(requests()):
        answers.append(completion.tokens)
        finished += 1
    assert len(answers) == 12 and most <= 3 + 3
    assert answers == [
        c.tokens for c in llm.generate([(f"what is {n} ?", picture(n)) for n in range(12)], FEW, recipe=None)
    ]


def test_recipes_and_keep_by_call(model: Any, recipe: Recipe, llm: LLM, tmp_path: Path) -> None:
    asked = ("what is it ?", picture(2))
    recipe.save(tmp_path / "r.json")
    pruned = llm.generate(asked, FEW)
    for chosen in (recipe, tmp_path / "r.json", str(tmp_path / "r.json")):
        again = llm.generate(asked, FEW, recipe=chosen)
        assert (again.tokens, again.usage.visual_by_layer) == (pruned.tokens, pruned.usage.visual_by_layer)
    fewer = llm.generate(asked, FEW, keep=0.125).usage.visual_kept
    assert fewer == 2 < pruned.usage.visual_kept < llm.generate(asked, FEW, recipe=None).usage.visual_kept == 16
    first = recipe_for(model, (1,), (0.5,))
    with LLM(model, recipe=first, page_tokens=4) as other:
        for chosen in (first, recipe, first):  # the second prunes where the engine had no boundary
            found = other.generate(asked, FEW, recipe=chosen)
            assert (found.text.strip(), found.usage.visual_by_layer) == plain(model, chosen, asked[0], [asked[1]])


def test_logprobs_seeds_and_stops(llm: LLM) -> None:
    asked = ("what is it ?", picture(3))
    made = llm.generate(asked, SamplingParams(max_tokens=4, logprobs=2, ignore_eos=True))
    assert len(made.logprobs) == len(made.tokens) == 4 and all(len(e.top) == 2 for e in made.logprobs)
    assert [e.token for e in made.logprobs] == list(made.tokens) and all(e.logprob <= 0 for e in made.logprobs)
    drawn = SamplingParams(max_tokens=8, temperature=2.0, seed=11, ignore_eos=True)
    assert llm.generate(asked, drawn).tokens == llm.generate([asked, "a ?"], drawn)[0].tokens
    word = made.text.split()[0]
    assert llm.generate(asked, SamplingParams(max_tokens=4, stop=(word,), ignore_eos=True)).text == ""


def test_a_conversation_keeps_the_first_selection(llm: LLM) -> None:
    turns = [{"role": "system", "content": "be short"}]
    turns += [{"role": "user", "content": [{"type": "image", "image": picture(4)}, {"type": "text", "text": "star ?"}]}]
    first = llm.chat(turns, FEW)
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "where is it ?"}]
    second = llm.chat(turns, FEW)
    assert second.usage.selection_tokens < second.usage.prompt_tokens and second.usage.cached_tokens > 0
    assert second.usage.visual_by_layer == first.usage.visual_by_layer


def test_threads_share_it(llm: LLM) -> None:
    asked = [[(f"what is {n} ?", picture(n + 10 * k)) for n in range(3)] for k in range(3)]
    alone = [llm.generate(part, FEW) for part in asked]
    found: list[Any] = [None] * 3

    def work(k: int) -> None:
        found[k] = llm.generate(asked[k], FEW)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[c.tokens for c in part] for part in found] == [[c.tokens for c in part] for part in alone]


def test_errors_are_one_line_and_nothing_stays_behind(model: Any, llm: LLM, recipe: Recipe, tmp_path: Path) -> None:
    image = picture(5)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    image.save(tmp_path / "good.png")
    good = ("what is it ?", image)
    for asked, kind, words in (
        (7, UsageError, "prompt: expected a text, "),
        ([good, ("a", image, image)], UsageError, r"prompts\[1\]: expected a text, "),
        ({"prompt": "a", "image": image}, UsageError, "prompt: expected a text, "),
        ("what is <image> ?", UsageError, "prompt: must not contain <image>"),
        (["a ?", "what is <image> ?"], UsageError, r"prompts\[1\]: must not contain <image>"),
        ("a \ud800", UsageError, "prompt: expected Unicode text"),
        (("a ?", 3.5), ImageError, r"prompt.images\[0\]: expected a Pillow image, a path"),
        (("a ?", np.zeros((4, 4, 3))), ImageError, r"prompt.images\[0\]: expected an array uint8"),
        (("a ?", np.zeros((0, 4, 3), np.uint8)), ImageError, r"prompt.images\[0\]: the image is empty"),
        (("a ?", tmp_path / "none.png"), ImageError, r"prompt.images\[0\]: .*none.png cannot be read"),
        ([good, ("a ?", tmp_path / "broken.png")], ImageError, r"prompts\[1\].images\[0\]: .*not a readable image"),
        ([good, Prompt([])], UsageError, r"prompts\[1\]: prompt: expected at least one token"),
        (Prompt([1] * 100_000), UsageError, "prompt: 100000 tokens leave no room"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(tmp_path / "good.png")}}]}],
            ImageError,
            r"prompt\[0\].content\[0\]: expected data:image/",
        ),
        ([{"role": "robot", "content": "a"}], UsageError, r'prompt\[0\]: expected "role" to be one of'),
        ([{"role": "user", "content": 5}], UsageError, r'prompt\[0\]: expected "content" to be a text'),
        ([{"role": "user", "content": [{"type": "video"}]}], UsageError, r"prompt\[0\].content\[0\]: expected a text"),
        (
            [{"role": "system", "content": [{"type": "image", "image": image}]}],
            UsageError,
            r"content\[0\]: expected a text part",
        ),
    ):
        with pytest.raises(kind, match=words) as caught:
            llm.generate(asked, FEW)
        assert "\n" not in str(caught.value)
    for messages in ([], "what ?", [["a"]]):
        with pytest.raises(UsageError, match="messages: expected a list of"):
            llm.chat(messages)
    with pytest.raises(UsageError, match="sampling: expected SamplingParams, got dict"):
        llm.generate(good, {"max_tokens": 3})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="keep: needs a recipe"):
        llm.generate(good, FEW, recipe=None, keep=0.5)
    with pytest.raises(RecipeError, match=r"nowhere\.json"):
        llm.generate(good, FEW, recipe="nowhere.json")
    assert llm.generate(good, FEW).tokens
    while llm.engine.busy:
        llm.engine.step()
    llm.engine.check_integrity()
    assert not llm._inboxes


def test_what_cannot_be_an_llm(model: Any, tmp_path: Path) -> None:
    float_model = speaking("llava", 2)
    with pytest.raises(UsageError, match=r"the engine serves quantized language models, this one is a float one"):
        LLM(float_model)
    assert why_not(model) is None and DEFAULT.name in str(why_not(float_model))
    with pytest.raises(UsageError, match="threads: expected one of kv_bytes, page_tokens"):
        LLM(model, threads=2)
    with pytest.raises(UsageError, match="kv_bytes: expected at least 1"):
        LLM(model, kv_bytes=0)
    with pytest.raises(CheckpointError, match="nowhere"):
        LLM(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"none\.json"):
        LLM(model, recipe=tmp_path / "none.json")
    with LLM(model, page_tokens=4) as llm:
        stream = llm.stream("a ?", SamplingParams(max_tokens=50, ignore_eos=True))
        next(stream)
    with pytest.raises(UsageError, match="LLM: closed"):
        list(stream)
    with pytest.raises(UsageError, match="LLM: closed"):
        llm.generate("a ?")
    llm.close()


def test_it_is_at_the_front_door() -> None:
    assert quota.LLM is LLM and {"LLM", "SamplingParams"} <= set(dir(quota))
