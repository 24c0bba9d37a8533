"""The weight quantizers of the engines, so that each is checked against its own numbers."""

from __future__ import annotations

import torch
from torch import Tensor

INT8_UNIT = {"amx_int8": "tdpbusd", "avx512_vnni": "vpdpbusd", "avx2": "vpmaddubsw"}


def int8_unit(features: list[str]) -> str:
    """The fastest byte arithmetic of a machine with these features."""
    return next((unit for feature, unit in INT8_UNIT.items() if feature in features), "vpmaddubsw")


def symmetric_blocks(w: Tensor, block: int, bits: int) -> tuple[Tensor, Tensor]:
    """w float32 [N, K] -> (codes int8 [N, K] in [-2^(bits-1), 2^(bits-1) - 1], scale float32 [N, K / block])."""
    n, k = w.shape
    blocks = w.view(n, k // block, block)
    top = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(-1).clamp_min(1e-8) / top
    return (blocks / scale[..., None]).round().clamp(-top - 1, top).to(torch.int8).view(n, k), scale
