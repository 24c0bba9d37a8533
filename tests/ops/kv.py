"""Caches for the tests of the KV ops: packed random keys and values in a larger, poisoned buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.ops.kv4_append import kv4_append_ref
from quota.ops.weights import Kv


def cache(x: Tensor, capacity: int, position: int = 0) -> Kv:
    """x float32 [B, Hkv, S, D] quantized at slots position.. of an otherwise poisoned cache."""
    b, h, _, d = x.shape
    q = torch.full((b, h, capacity, d // 2), 255, dtype=torch.uint8)
    scale, zero = (torch.full((b, h, capacity), float("nan")) for _ in range(2))
    kv4_append_ref(q, scale, zero, x, position, 0.9)
    return q, scale, zero


def filled(kv: Kv, slots: int) -> Kv:
    """The first `slots` slots replaced by ordinary zeros (left padding)."""
    for t in kv:
        t[:, :, :slots] = 0
    return kv
