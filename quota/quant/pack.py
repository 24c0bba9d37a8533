"""Two 4-bit integers per byte: the low nibble holds the even index. Odd lengths are padded with a zero nibble."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_uint4(q: Tensor) -> Tensor:
    """uint8 [..., K] in 0..15 -> uint8 [..., ceil(K/2)]."""
    if q.shape[-1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    pairs = q.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_uint4(packed: Tensor, k: int) -> Tensor:
    """uint8 [..., ceil(k/2)] -> uint8 [..., k] in 0..15."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :k]


def pack_int4(q: Tensor) -> Tensor:
    """int8 [..., K] in -8..7 -> uint8 [..., ceil(K/2)], two's complement nibbles."""
    return pack_uint4(q.to(torch.uint8) & 15)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """uint8 [..., ceil(k/2)] -> int8 [..., k] in -8..7."""
    return ((unpack_uint4(packed, k) ^ 8).to(torch.int8)) - 8
