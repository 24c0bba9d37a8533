"""`token_select`: stable top-k per row by rank: how many eligible scores come before this one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.launch import cdiv, launch

_TOKENS = 64


@triton.jit
def token_select_kernel(score, eligible, keep, mask, slots, TOKENS: tl.constexpr):
    """Program (row, TOKENS tokens). NaN ranks above every number, ties go to the lower index."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    own = tl.load(score + b * slots + i, mask=i < slots, other=0.0)
    allowed = tl.load(eligible + b * slots + i, mask=i < slots, other=0) != 0
    rank = tl.zeros((TOKENS,), tl.int32)
    for first in range(0, slots, TOKENS):
        j = first + tl.arange(0, TOKENS)
        other = tl.load(score + b * slots + j, mask=j < slots, other=0.0)
        counts = tl.load(eligible + b * slots + j, mask=j < slots, other=0) != 0
        own_nan, other_nan = (own != own)[:, None], (other != other)[None, :]
        above = (other_nan & (own == own)[:, None]) | (other[None, :] > own[:, None])
        equal = (other[None, :] == own[:, None]) | (own_nan & other_nan)
        before = counts[None, :] & (above | (equal & (j[None, :] < i[:, None])))
        rank += tl.sum(before.to(tl.int32), 1)
    chosen = allowed & (rank < tl.load(keep + b))
    tl.store(mask + b * slots + i, chosen.to(tl.uint8), mask=i < slots)


def token_select(score: Tensor, eligible: Tensor, keep: Tensor) -> Tensor:
    """As `quota.ops.token_select`."""
    batch, slots = score.shape
    mask = torch.empty(batch, slots, dtype=torch.uint8, device=score.device)
    allowed = eligible.contiguous().view(torch.uint8)
    launch(
        token_select_kernel,
        (batch, cdiv(slots, _TOKENS)),
        score.contiguous(),
        allowed,
        keep.contiguous(),
        mask,
        slots,
        _TOKENS,
        num_warps=4,
    )
    return mask.view(torch.bool)
