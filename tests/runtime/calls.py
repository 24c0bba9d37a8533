"""Tiny models of both families, answers recomputed without `generate` and without a cache, and what a refusal looks
like."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from quota.core.errors import UsageError
from quota.models import find_family
from quota.runtime.patch import patched
from tests.tiny import IMAGE_TOKEN, llava_inputs, qwen_inputs, tiny_llava, tiny_qwen

TINY = {"llava": (tiny_llava, llava_inputs), "qwen2_5_vl": (tiny_qwen, qwen_inputs)}
CASES = [(family, kind) for family in TINY for kind in ("float", "quantized")]
TOKENS, PROMPTS = 5, range(3)
RECIPES = {
    "quota": {},
    "last token": {"method": "custom", "selections": [{"score": "last_token"}] * 3},
    "random": {"method": "custom", "candidates": (0, 2, 3), "selections": [{"score": "random"}] * 3},
}

PAIRS = [(case, name) for case in CASES for name in ("quota", "random" if case[1] == "float" else "last token")]


def inputs_of(model, seed: int = 1) -> dict[str, Tensor]:
    """A batch of two rows."""
    return TINY[find_family(model).name][1](model, seed=seed)


KNOWN: dict[tuple, tuple[Tensor, dict[int, Tensor]]] = {}


def reference(model, recipe, inputs) -> tuple[Tensor, dict[int, Tensor]]:
    """(new ids [B, TOKENS], kept): the choice of one bare forward over the prompt; then every token from a forward over
    everything so far that keeps that choice, without `generate` and without a cache."""
    key = (model, recipe.model_dump_json(), *(tuple(value.flatten().tolist()) for value in inputs.values()))
    if key not in KNOWN:
        KNOWN[key] = recomputed(model, recipe, inputs)
    return KNOWN[key]


@torch.no_grad()
def recomputed(model, recipe, inputs) -> tuple[Tensor, dict[int, Tensor]]:
    with patched(model, recipe) as handle:
        model(**placed(inputs))
        kept = dict(handle.kept)
    fed = dict(inputs)
    with patched(model, recipe, forced=kept):
        for _ in range(TOKENS):
            logits = model(**placed(fed), use_cache=False).logits[:, -1]
            logits[:, [IMAGE_TOKEN, model.generation_config.eos_token_id]] = -torch.inf
            fed["input_ids"] = torch.cat([fed["input_ids"], logits.argmax(-1)[:, None]], 1)
            for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
                if name in fed:
                    fed[name] = nn.functional.pad(fed[name], (0, 1), value=value)
    return fed["input_ids"][:, -TOKENS:], kept


def placed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the positions that `generate` gives: a row's first real token is at 0."""
    if "mm_token_type_ids" in inputs:
        return inputs
    mask = inputs["attention_mask"]
    return {**inputs, "position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)}


def same(kept: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return kept.keys() == other.keys() and all(torch.equal(mask, other[layer]) for layer, mask in kept.items())


@torch.no_grad()
def generated(model, inputs, **options) -> Tensor:
    """New ids [B, TOKENS]."""
    banned = [IMAGE_TOKEN, model.generation_config.eos_token_id]
    out = model.generate(
        **inputs,
        **{
            "do_sample": False,
            "max_new_tokens": TOKENS,
            "min_new_tokens": TOKENS,
            "suppress_tokens": banned,
            **options,
        },
    )
    return out[:, inputs["input_ids"].shape[1] :]


def refuse(message: str, call) -> None:
    """One sentence of one line that starts with the field."""
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and re.match(r"[a-z_]+: ", str(caught.value))
