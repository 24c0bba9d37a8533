"""`w4a16_linear`: float activations times packed int4 weights that share a scale and a zero in groups of 128 along
K."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.fma import chain_matmul, fma
from quota.ops.weights import GroupedWeight
from quota.quant.grouped import groups_of
from quota.quant.pack import unpack_uint4


def w4a16_linear_ref(x: Tensor, weight: GroupedWeight, bias: Tensor | None = None) -> Tensor:
    """x float32, bfloat16 or float16 [M, K], bias float32 [N] or None -> [M, N] in the dtype of x. w = (q - zero) *
    scale.

    x is widened to float32; each group's sum of x (q - zero) is an ascending chain of fused multiply-adds from zero;
    the groups are joined by y = fma(sum, scale, y) in ascending order from zero; then + bias, rounded once to the dtype
    of x. Exactness: equal bits everywhere.
    """
    codes = unpack_uint4(weight.codes(), weight.k)
    b = (
        groups_of(codes).float() - weight.w_zero[..., None].float()
    )  # [N, G, 128]; activations past K are zero, so what lies there adds nothing
    sums = chain_matmul(groups_of(x.float()).transpose(0, 1), b.permute(1, 2, 0))
    y = x.new_zeros(x.shape[0], weight.n, dtype=torch.float32)
    for group, scale in zip(sums, weight.w_scale.T, strict=True):
        y = fma(group.double(), scale.double(), y)
    return (y if bias is None else y + bias).to(x.dtype)


w4a16_linear = Op(w4a16_linear_ref, native, triton)  # the first that supports the device
