"""`quantize_act`: activate, transform, clip, quantize and pack the input of one projection group."""

from __future__ import annotations

from torch import Tensor

from quota.core.registry import Op
from quota.ops import cuda, native, triton
from quota.ops.elementwise import apply_prologue
from quota.ops.transform import transform_ref
from quota.ops.weights import Factor
from quota.quant.affine import quantize_symmetric
from quota.quant.pack import pack_int4


def quantize_act_ref(
    x: Tensor, left: Factor | None, right: Factor | None, clip: float, prologue: str | None = None
) -> tuple[Tensor, Tensor]:
    """x float32 [M, K], factors as in `transform`, clip in (0, 1] -> (x_q uint8 [M, ceil(K/2)] int4 nibbles, x_scale
    float32 [M]).

    prologue: what happens to x first; None, "gelu", "quick_gelu" (x * sigmoid(1.702 x)), or "silu_mul" (x [M, 2K] ->
    silu(x[:, :K]) * x[:, K:]). scale = max(max|y| * clip, 1e-8) / 7; q = clamp(round_half_even(y * (1 / scale)), -8, 7)
    on y = transform(prologue(x)). Exactness: the prologue's bits are equal everywhere (`quota.ops.elementwise`); the
    integer stage equals the reference bit for bit on equal y; the transform as in `transform`.
    """
    if prologue is not None:
        x = apply_prologue(x, prologue)
    q, scale = quantize_symmetric(transform_ref(x, left, right), clip)
    return pack_int4(q), scale


quantize_act = Op(quantize_act_ref, cuda, native, triton)  # the first that supports the device
