"""Tiny random models of the embedded benchmark's form with its processors: they read text and images, and what they
say differs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from quota.models.rtn import quantize_rtn
from quota.scenes import model as llava
from quota.scenes import qwen_model as qwen


def speaking(family: str, layers: int = 4) -> Any:
    """A float model in eval mode, its processor on it; of LLaVA 16 visual tokens and width 64."""
    if family == "llava":
        made, processor = llava.build_model(llava.build_config(56, 64, layers), seed=1), llava.build_processor(56)
    else:
        made, processor = qwen.build_model(qwen.build_config(layers=layers), seed=1), qwen.build_processor()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim >= 2:  # larger than a usual initialisation, so that greedy answers differ
                std = 1.0 if "embed_tokens" in name or "lm_head" in name else 1.6 / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    made.eval().processor = processor
    return made


@cache
def served(family: str) -> Any:
    """The same, W4A4KV4 whole; it is shared, so leave it as it was."""
    made = speaking(family)
    processor = made.processor
    made = quantize_rtn(made)
    made.processor = processor
    return made
