"""`quantize_act`: prologue, transform, clip, quantize and pack, one row per block and one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.floats import largest_magnitude, symmetric_code
from quota_kernels.launch import launch, warps_for
from quota_kernels.transform import activated, factors, kronecker, scratch_of, tile_of

_PROLOGUES = {None: 0, "silu_mul": 1, "quick_gelu": 2, "gelu": 3}


@triton.jit
def quantize_act_kernel(
    x,
    left,
    right,
    sums,
    prepared,
    y,
    x_q,
    x_scale,
    l,
    r,
    exponent,
    clip,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PROLOGUE: tl.constexpr,
    LP: tl.constexpr,
    RP: tl.constexpr,
    BYTES: tl.constexpr,
):
    """y float32 [M, l * r] receives the transformed row: packing pairs neighbours of the flat row, which lie in
    different rows of an odd matrix. prepared: as y, for the row after its prologue; sums: `kronecker`'s."""
    m = tl.program_id(0).to(tl.int64)
    k = l * r
    width = k
    if PROLOGUE == 1:
        x += m * 2 * k
    else:
        x += m * k
    y += m * k
    b = tl.arange(0, BYTES)
    if LEFT or RIGHT:
        if PROLOGUE != 0:
            prepared += m * k
            for first in range(0, k, BYTES):
                value = activated(x, first + b, first + b < k, width, PROLOGUE)
                tl.store(prepared + first + b, value, mask=first + b < k)
            tl.debug_barrier()
            x = prepared
        reach = kronecker(x, left, right, sums + m * k, y, l, r, exponent, LEFT, RIGHT, LP, RP).to(
            tl.float32, bitcast=True
        )
    else:
        largest = tl.zeros((BYTES,), tl.float32)
        for first in range(0, k, BYTES):
            value = activated(x, first + b, first + b < k, width, PROLOGUE)
            tl.store(y + first + b, value, mask=first + b < k)
            bits = tl.maximum(largest.to(tl.int32, bitcast=True), value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            largest = bits.to(tl.float32, bitcast=True)
        reach = largest_magnitude(largest, 0)
    reach = reach * clip
    scale = tl.div_rn(tl.where(reach < 1e-8, 1e-8, reach), 7.0)
    inverse = tl.div_rn(1.0, scale)
    tl.store(x_scale + m, scale)
    tl.debug_barrier()  # y is complete
    row_bytes = (k + 1) // 2
    for first in range(0, row_bytes, BYTES):
        at = 2 * (first + b)
        low = symmetric_code(tl.load(y + at, mask=at < k, other=0.0), inverse)
        high = symmetric_code(tl.load(y + at + 1, mask=at + 1 < k, other=0.0), inverse)
        tl.store(
            x_q + m * row_bytes + first + b, ((low & 15) | ((high & 15) << 4)).to(tl.uint8), mask=first + b < row_bytes
        )


def quantize_act(
    x: Tensor, left: Tensor | None, right: Tensor | None, exponent: int, clip: float, prologue: str | None = None
) -> tuple[Tensor, Tensor]:
    """As `quota.ops.quantize_act`; factors as in `transform`."""
    if prologue not in _PROLOGUES:
        raise ValueError(f"prologue: expected one of {', '.join(filter(None, _PROLOGUES))}, got {prologue!r}")
    x = x.contiguous()
    m, k = x.shape
    if prologue == "silu_mul":
        if k % 2:
            raise ValueError(f"x: expected gate and up halves of one size, got {k} features")
        k //= 2
    l, r = factors(k, left, right)
    y = torch.empty(m, k, dtype=torch.float32, device=x.device)
    x_q, x_scale = (
        torch.empty(m, (k + 1) // 2, dtype=torch.uint8, device=x.device),
        torch.empty(m, dtype=torch.float32, device=x.device),
    )
    moves = left is not None or right is not None
    prepared = torch.empty_like(y) if moves and prologue is not None else y
    lp, rp = tile_of(l, r) if moves else (1, 1)
    size = min(2048, max(32, triton.next_power_of_2((k + 1) // 2)))
    launch(
        quantize_act_kernel,
        (m,),
        x,
        x if left is None else left.contiguous(),
        x if right is None else right.contiguous(),
        scratch_of(y, m * k, left, right),
        prepared,
        y,
        x_q,
        x_scale,
        l,
        r,
        exponent,
        clip,
        left is not None,
        right is not None,
        _PROLOGUES[prologue],
        lp,
        rp,
        size,
        num_warps=warps_for(lp * rp) if moves else warps_for(size, 8),
    )
    return x_q, x_scale
