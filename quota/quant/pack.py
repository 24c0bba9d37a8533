"""Two 4-bit integers per byte: the low nibble holds the even index. Odd lengths are padded with a zero nibble."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.formats import INT4

_BITS, _MIDDLE = INT4.stored_bits, INT4.middle
_MASK = (1 << _BITS) - 1


def pack_uint4(q: Tensor) -> Tensor:
    """uint8 [..., K] in 0..15 -> uint8 [..., ceil(K/2)]."""
    if q.shape[-1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    pairs = q.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << _BITS)


def unpack_uint4(packed: Tensor, k: int) -> Tensor:
    """uint8 [..., ceil(k/2)] -> uint8 [..., k] in 0..15."""
    return torch.stack((packed & _MASK, packed >> _BITS), -1).flatten(-2)[..., :k]


def pack_int4(q: Tensor) -> Tensor:
    """int8 [..., K] in -8..7 -> uint8 [..., ceil(K/2)], two's complement nibbles."""
    return pack_uint4(q.to(torch.uint8) & _MASK)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """uint8 [..., ceil(k/2)] -> int8 [..., k] in -8..7."""
    return ((unpack_uint4(packed, k) ^ _MIDDLE).to(torch.int8)) - _MIDDLE
