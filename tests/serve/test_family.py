"""What the server promises for every family: answers of transformers' generate in the family's chat form, visual tokens
counted per image, one choice of tokens for a whole conversation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from quota.core.recipe import kept_tokens
from quota.models import find_family
from quota.runtime.patch import patched
from quota.server.config import Settings
from quota.server.service import Service
from tests.prune.recipes import recipe_for
from tests.serve.asking import ask, generated
from tests.serve.conftest import Host, Running
from tests.serve.pictures import noise, user
from tests.speaking import served


@dataclass(frozen=True)
class Form:
    """How a family writes a question with its images, and the words that stand for images in a prompt."""

    image: str
    prompt: str
    marks: tuple[str, ...]


FORMS = {
    "llava": Form("<image>\n", "USER: {}{} ASSISTANT:", ("<image>",)),
    "mistral3": Form("[IMG]", "[INST]{}{}[/INST]", ("[IMG]",)),
    "paligemma": Form("<image>", "{}<s>{}\n", ("<image>",)),
    "qwen2_5_vl": Form(
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n",
        ("<|image_pad|>", "<|video_pad|>"),
    ),
}
MARKS = [(family, mark) for family, form in FORMS.items() for mark in form.marks]


@pytest.fixture(scope="module", params=FORMS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    return served(family)


@pytest.fixture(scope="module")
def recipe(model: Any) -> Any:
    return recipe_for(model, reference="per_image")


@pytest.fixture(scope="module")
def server(model: Any, recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("recipes") / "quota.json"
    recipe.save(path)
    settings = Settings(
        checkpoint="tiny",
        recipes=(f"pruned={path}",),
        kv_bytes=8 << 20,
        page_tokens=4,
        step_s=math.inf,  # a prompt in one step, however busy the machine is: rows of a step are counted below
    )
    host = Host(Service(model, settings))
    yield host.running
    host.stop()


def tokens_of(model: Any, images: list[Any]) -> list[int]:
    """Visual tokens of each image."""
    arch = find_family(model)
    text = FORMS[arch.name].image * len(images)
    inputs = model.processor(text=[text], images=images, return_tensors="pt")
    return [arch.image_tokens(image) for image in arch.images(inputs)]


def test_answers_are_those_of_generate(server: Running, family: str, model: Any, recipe: Any) -> None:
    wide, high, form = noise(200, 60, seed=1), noise(70, 130, seed=2), FORMS[family]
    questions = [
        ([wide], "what color is the star ?"),
        ([wide, high], "which is it ?"),
        ([], "where is it ?"),
        ([noise(1, 1)], "what is it ?"),
    ]
    for images, question in questions:
        text = form.prompt.format(form.image * len(images), question)
        want = generated(model, text, images)
        with patched(model, recipe):
            pruned = generated(model, text, images)
        assert ask(server, user(question, *images)).choices[0].message.content == pruned
        assert ask(server, user(question, *images), extra_body={"recipe": "none"}).choices[0].message.content == want
    server.idle()


def test_visual_tokens_are_counted_per_image(server: Running, model: Any) -> None:
    images = [noise(200, 60, seed=3), noise(70, 130, seed=4)]
    counts = tokens_of(model, images)
    assert len(set(counts)) == (2 if find_family(model).visual_tokens is None else 1)
    for more, ratio in (({}, 0.25), ({"keep": 0.5}, 0.5)):
        usage = ask(server, user("which is it ?", *images), extra_body=more).usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.quota["visual_tokens"] == sum(counts) and usage.quota["selection"] == "prompt"
        assert usage.quota["visual_tokens_kept"] == sum(kept_tokens(ratio, tokens) for tokens in counts)


def test_second_turn_keeps_the_first_selection(server: Running, model: Any) -> None:
    first = user("what is it ?", noise(200, 60, seed=5), noise(70, 130, seed=6))
    answer = ask(server, first)
    usage = ask(
        server, first, {"role": "assistant", "content": answer.choices[0].message.content}, user("where is it ?")
    ).usage
    if find_family(model).prefix:  # tokens of the first turn see the second
        assert usage.quota["selection"] == "prompt" and usage.quota["selection_tokens"] == usage.prompt_tokens
    else:
        assert usage.quota["selection"] == "first_turn"
        assert usage.quota["selection_tokens"] == answer.usage.prompt_tokens
    assert usage.quota["visual_tokens_kept"] == answer.usage.quota["visual_tokens_kept"]


def test_choices_share_the_prompt(server: Running) -> None:
    question = user("what is it ?", noise(200, 60, seed=7))
    rows = server.service.engine.engine.stats.prefill_rows
    group = ask(server, question, n=4, temperature=1.0, seed=3)
    computed = server.service.engine.engine.stats.prefill_rows - rows
    assert len({choice.message.content for choice in group.choices}) > 1 and computed <= group.usage.prompt_tokens
    server.idle()


@pytest.mark.parametrize(("family", "mark"), MARKS, indirect=["family"])
def test_marks_in_texts_are_refused(server: Running, mark: str) -> None:
    with pytest.raises(openai.BadRequestError, match="must not contain"):
        ask(server, user(f"what is {mark} ?"))
    with pytest.raises(openai.BadRequestError, match="must not contain"):
        server.client.completions.create(model="tiny", prompt=mark)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize(("family", "mark"), [pair for pair in MARKS if pair[0] != "llava"], indirect=["family"])
def test_a_mark_in_two_parts_is_refused(server: Running, mark: str, images: int) -> None:
    """The template joins them; the plain form of LLaVA puts a space between."""
    parts = user("", *[noise(60, 60)] * images)["content"][:images] + [
        {"type": "text", "text": mark[:5]},
        {"type": "text", "text": mark[5:]},
    ]
    with pytest.raises(openai.BadRequestError, match="must not contain"):
        ask(server, {"role": "user", "content": parts})
