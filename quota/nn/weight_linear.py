"""W4A16 linear layer: int4 weights in groups, float activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quota import ops
from quota.nn.linear import Float32State, as_dtype_of, without_grad
from quota.quant.grouped import dequantize_groups, group_count
from quota.quant.pack import unpack_uint4

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


class WeightLinear(Float32State):
    """y = (x * input_scale) w^T + bias with w = (q - zero) * scale, in groups of 128 along K.

    Buffers, which are also the checkpoint's tensors: `w_q` [N, ceil(K/2)] uint8 (two codes 0..15, low = even k),
    `w_scale` float32 and `w_zero` uint8 [N, ceil(K/128)], `bias` [N] float32 or absent, `input_scale` [K] float32 or
    absent (AWQ's, where no module before could take it).
    """

    w_q: Tensor
    w_scale: Tensor
    w_zero: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, input_scale: bool = False, device: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        float32: Any = {"dtype": torch.float32, "device": device}
        shape = (out_features, group_count(in_features))
        self.register_buffer("w_q", torch.zeros(out_features, (in_features + 1) // 2, dtype=torch.uint8, device=device))
        self.register_buffer("w_scale", torch.zeros(shape, **float32))
        self.register_buffer("w_zero", torch.zeros(shape, dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.zeros(out_features, **float32) if bias else None)
        self.register_buffer("input_scale", torch.ones(in_features, **float32) if input_scale else None)
        self._grouped: ops.GroupedWeight | None = None

    def forget(self) -> None:
        self._grouped = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_grouped": None}  # copies repack for themselves

    @property
    def grouped(self) -> ops.GroupedWeight:
        """The weight in the layout the implementation wants, made at first use."""
        if self._grouped is None:
            self._grouped = ops.GroupedWeight(self.w_q, self.w_scale, self.w_zero, self.in_features)
        return self._grouped

    @without_grad
    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] any float dtype -> [..., N] in the same dtype; all arithmetic is float32."""
        rows = x.reshape(-1, self.in_features)
        if rows.dtype not in _NATIVE_DTYPES or self.input_scale is not None:
            rows = rows.float()
        if self.input_scale is not None:
            rows = rows * self.input_scale
        return as_dtype_of(ops.w4a16_linear(rows, self.grouped, self.bias).view(*x.shape[:-1], self.out_features), x)

    def dequantized_weight(self) -> Tensor:
        """[N, K] float32, of the scaled input where there is an `input_scale`."""
        return dequantize_groups(unpack_uint4(self.grouped.codes(), self.in_features), self.w_scale, self.w_zero)

    def extra_repr(self) -> str:
        scaled = self.input_scale is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" input_scale={scaled}"
        )
