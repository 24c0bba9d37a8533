"""The server over Qwen2.5-VL: its chat template, pictures of any size, and visual tokens counted per picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from quota.models.rtn import quantize_rtn
from quota.runtime.patch import patched
from quota.scenes.qwen_model import build_config, build_model, build_processor
from quota.server.config import Settings
from quota.server.service import Service
from tests.prune.recipes import recipe_for
from tests.serve.conftest import Host, Running
from tests.serve.pictures import noise, user


@pytest.fixture(scope="module")
def qwen() -> Any:
    """Weights large enough that answers differ."""
    made = build_model(build_config(layers=4), seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim >= 2:
                std = 1.0 if "embed_tokens" in name else 1.6 / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    made = quantize_rtn(made.eval())
    made.processor = build_processor()
    return made


@pytest.fixture(scope="module")
def recipe(qwen: Any) -> Any:
    return recipe_for(qwen, reference="per_image")


@pytest.fixture(scope="module")
def server(qwen: Any, recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("recipes") / "quota.json"
    recipe.save(path)
    host = Host(
        Service(qwen, Settings(checkpoint="tiny", recipes=(f"pruned={path}",), kv_bytes=8 << 20, page_tokens=4))
    )
    yield host.running
    host.stop()


def ask(server: Running, *messages: Any, **options: Any) -> Any:
    return server.client.chat.completions.create(
        model="tiny", messages=list(messages), **{"temperature": 0, "max_tokens": 8, **options}
    )


def generated(model: Any, text: str, pictures: list[Any]) -> str:
    inputs = model.processor(text=[text], images=pictures or None, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return str(model.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"


def test_answers_are_those_of_generate(server: Running, qwen: Any, recipe: Any) -> None:
    wide, high = noise(200, 60, seed=1), noise(70, 130, seed=2)
    questions = [
        ([wide], "what is it ?"),
        ([wide, high], "which is it ?"),
        ([], "what is it ?"),
        ([noise(1, 1)], "what is it ?"),
    ]
    for pictures, question in questions:
        text = f"<|im_start|>user\n{SHOWN * len(pictures)}{question}<|im_end|>\n<|im_start|>assistant\n"
        want = generated(qwen, text, pictures)
        with patched(qwen, recipe):
            pruned = generated(qwen, text, pictures)
        assert ask(server, user(question, *pictures)).choices[0].message.content == pruned
        assert ask(server, user(question, *pictures), extra_body={"recipe": "none"}).choices[0].message.content == want
    server.idle()


def test_visual_tokens_are_counted_per_picture(server: Running, qwen: Any) -> None:
    pictures = [noise(200, 60, seed=3), noise(70, 130, seed=4)]
    grids = qwen.processor.image_processor(pictures, return_tensors="pt")["image_grid_thw"].prod(-1) // 4
    usage = ask(server, user("which is it ?", *pictures)).usage
    assert len(set(grids.tolist())) == 2 and usage.quota["visual_tokens"] == int(grids.sum())
    assert usage.quota["visual_tokens_kept"] == sum(-(-int(tokens) // 4) for tokens in grids)


def test_second_turn_keeps_the_first_selection(server: Running) -> None:
    first = user("what is it ?", noise(200, 60, seed=5), noise(70, 130, seed=6))
    answer = ask(server, first)
    usage = ask(
        server, first, {"role": "assistant", "content": answer.choices[0].message.content}, user("where is it ?")
    ).usage
    assert usage.quota["selection"] == "first_turn" and usage.quota["selection_tokens"] == answer.usage.prompt_tokens


def test_choices_share_the_prompt(server: Running) -> None:
    question = user("what is it ?", noise(200, 60, seed=7))
    rows = server.service.engine.engine.stats.prefill_rows
    group = ask(server, question, n=4, temperature=1.0, seed=3)
    computed = server.service.engine.engine.stats.prefill_rows - rows
    assert len({choice.message.content for choice in group.choices}) > 1 and computed <= group.usage.prompt_tokens
    server.idle()


@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|video_pad|>"])
def test_a_mark_in_two_parts_is_refused(server: Running, mark: str, pictures: int) -> None:
    """The template joins them."""
    parts = user("", *[noise(60, 60)] * pictures)["content"][:pictures] + [
        {"type": "text", "text": mark[:5]},
        {"type": "text", "text": mark[5:]},
    ]
    with pytest.raises(openai.BadRequestError, match="must not contain"):
        ask(server, {"role": "user", "content": parts})


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|video_pad|>"])
def test_marks_in_texts_are_refused(server: Running, mark: str) -> None:
    with pytest.raises(openai.BadRequestError, match="must not contain"):
        ask(server, user(f"what is {mark} ?"))
    with pytest.raises(openai.BadRequestError, match="must not contain"):
        server.client.completions.create(model="tiny", prompt=mark)
