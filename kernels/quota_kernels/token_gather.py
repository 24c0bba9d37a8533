"""`token_gather`: rows of kept tokens, in order; a copy of bytes."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.launch import cdiv, launch

_COLUMNS = 1024


@triton.jit
def token_gather_kernel(x, index, out, slots, kept, width, COLUMNS: tl.constexpr):
    """Program (row of out, COLUMNS units of it)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = row // kept * slots + tl.load(index + row)
    tl.store(out + row * width + column, tl.load(x + source * width + column, mask=column < width), mask=column < width)


def token_gather(x: Tensor, index: Tensor) -> Tensor:
    """As `quota.ops.token_gather`."""
    tail = x.shape[2:]
    out = torch.empty(*index.shape, *tail, dtype=x.dtype, device=x.device)
    width = math.prod(tail) * x.element_size()
    if not width:
        return out
    x = x.contiguous()
    unit = torch.int32 if width % 4 == 0 else torch.uint8
    wide, narrow = (t.view(torch.uint8) if t.dtype == torch.bool else t for t in (x, out))
    width //= unit.itemsize
    launch(
        token_gather_kernel,
        (index.numel(), cdiv(width, _COLUMNS)),
        wide.reshape(-1).view(unit),
        index.contiguous(),
        narrow.view(-1).view(unit),
        x.shape[1],
        index.shape[1],
        width,
        _COLUMNS,
        num_warps=4,
    )
    return out
