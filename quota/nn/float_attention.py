"""Attention of the parts that stay float: flash-attn where it is installed and applies, else torch's
scaled_dot_product_attention."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)


def why_not_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where flash-attn computes attention in `dtype` on `device`, else the reason it does not."""
    if device.type != "cuda":
        return f"flash-attn needs a CUDA device, this is {device.type}"
    if dtype not in _HALVES:
        return f"flash-attn computes in float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None if find_spec("flash_attn") else "flash-attn is not installed"


@cache
def _flash() -> Any:
    return import_module("flash_attn").flash_attn_func


def float_attention(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
    """q, k, v float32 [B, H, T, D], every query sees every key (or what `mask` allows) -> float32 [B, H, T, D].

    On the CPU in float32; on CUDA in `dtype`, the model's own.
    """
    if q.is_cuda and dtype in _HALVES:
        q, k, v = (t.to(dtype) for t in (q, k, v))
    if mask is None and why_not_flash(q.device, q.dtype) is None:
        return _flash()(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).float()
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    ).float()
