"""Qwen2.5-VL in the engine, beside what every family promises (test_contract.py): its modules, images and refusals."""

from __future__ import annotations

import pytest
import torch

from quota.core.errors import UsageError
from quota.core.recipe import kept_tokens
from quota.models.images import ImageInput
from quota.models.rtn import quantize_rtn
from quota.runtime.engine import Prompt
from quota.runtime.patch import patched
from tests.engine.asking import asked, engine, generated, patches, quantized, qwen_prompt, recipes, run, tokens
from tests.tiny import IMAGE_TOKEN, tiny_qwen


@pytest.fixture(scope="module")
def model():
    return quantized("qwen2_5_vl")


@pytest.mark.parametrize("modules", [("llm",), ("vision", "projector", "llm")])
def test_models_without_key_biases_apart(modules):
    """A float tower; and a decoder whose biases went into the cache with the keys."""
    model = quantize_rtn(tiny_qwen(), modules)
    case = qwen_prompt(3, patches(4, 6, 1), 2, patches(4, 4, 2), 4)
    with patched(model, recipes(model)["pruned"]):
        want = generated(model, case)
    assert tokens(run(engine(model), [asked("a", case)])["a"]) == want


def test_usage_counts_each_picture(model):
    usage = run(engine(model), [asked("a", qwen_prompt(3, patches(8, 8), 2, patches(4, 6), 5))])["a"][-1].usage
    assert (usage.visual_tokens, usage.prompt_tokens) == (22, 22 + 11 + 4)
    assert usage.visual_by_layer == (22, *(kept_tokens(r, 16) + kept_tokens(r, 6) for r in (0.75, 0.5, 0.25)))


def test_pictures_of_the_processor(model):
    grids = torch.tensor([[1, 8, 8], [1, 4, 6]])
    pixels = torch.randn(88, 96)
    first, second = engine(model).model.images({"pixel_values": pixels, "image_grid_thw": grids})
    assert first.grid == (1, 8, 8) and torch.equal(second.pixels, pixels[64:]) and engine(model).model.images({}) == ()


def test_refusals(model):
    made, good = engine(model), patches(4, 4)
    for image in (
        torch.zeros(3, 8, 8),
        ImageInput(good.pixels, (2, 2, 4)),
        ImageInput(good.pixels, (1, 3, 4)),
        ImageInput(good.pixels[:8], (1, 4, 4)),
    ):
        with pytest.raises(UsageError, match="image"):
            made.submit(asked("a", Prompt([122, *[IMAGE_TOKEN] * 4, 123, 5], [image])))
    with pytest.raises(UsageError, match="2 images"):  # nothing between them: which tokens are whose?
        made.submit(asked("a", Prompt([122, *[IMAGE_TOKEN] * 8, 123, 5], [good, good])))
    other = quantize_rtn(tiny_qwen())
    other.model.language_model.rotary_emb.inner.rope_type = "dynamic"
    with pytest.raises(UsageError, match="rope_type"):
        engine(other)
