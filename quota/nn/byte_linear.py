"""Linear layer of int8 weights, a scale per output channel, and int8 activations, a scale per token."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from quota import ops
from quota.core.formats import INT8, Format, Scheme
from quota.nn.linear import LinearSpec, RoundedLinear, Shapes, as_dtype_of, row_norm, without_grad
from quota.nn.mlp import activated
from quota.quant.affine import dequantize_symmetric, quantize_symmetric
from quota.quant.grouped import round_groups


class ByteLinear(RoundedLinear):
    """y = dequant(Q(x)) w^T + bias with w = w_scale * q.

    Buffers, which are also the checkpoint's tensors: `w_q` [N, K] int8, `w_scale` [N] float32, `bias` [N] float32 or
    absent.
    """

    OPS = (ops.w8a8_linear,)
    w_q: Tensor
    w_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: Any = None,
        scheme: Scheme,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        if scheme.weights != INT8 or scheme.activations != INT8:
            raise ValueError(f"scheme {scheme.name}: expected weights and activations stored as int8, got {scheme}")
        self.weights, self.in_features, self.out_features = INT8, in_features, out_features
        float32: Any = {"dtype": torch.float32, "device": device}
        self.register_buffer("w_q", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("w_scale", torch.zeros(out_features, **float32))
        self.register_buffer("bias", torch.zeros(out_features, **float32) if bias else None)
        self._weight: ops.ByteWeight | None = None

    @classmethod
    def build(cls, spec: LinearSpec, scheme: Scheme, shapes: Shapes | None) -> Self:
        """Nothing is optional."""
        return cls(spec.in_features, spec.out_features, bias=spec.bias, device=spec.device, scheme=scheme)

    @staticmethod
    def rounded(weight: Tensor, form: Format) -> dict[str, Tensor]:
        return ByteLinear.of_codes(*round_groups(weight.float(), form.unsigned))

    @staticmethod
    def of_codes(q: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        return {"w_q": (q.int() - zero.int()).to(torch.int8), "w_scale": scale[:, 0]}

    @staticmethod
    def value(tensors: dict[str, Tensor], form: Format, k: int) -> Tensor:
        return dequantize_symmetric(tensors["w_q"].float(), tensors["w_scale"])

    def forget(self) -> None:
        self._weight = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": None}  # copies repack for themselves

    @without_grad
    def forward(self, x: Tensor, prologue: str | None = None) -> Tensor:
        """As `SchemeLinear`; sums are exact in int32."""
        if self._weight is None:
            self._weight = ops.ByteWeight(self.w_q, self.w_scale)
        rows = activated(x.reshape(-1, x.shape[-1]).float(), prologue)
        return as_dtype_of(ops.w8a8_linear(rows, self._weight, self.bias).view(*x.shape[:-1], self.out_features), x)

    @torch.no_grad()
    def quant_risk(self, x: Tensor) -> Tensor:
        """As `QuantLinear.quant_risk`."""
        rows = x.float()
        return row_norm(rows - dequantize_symmetric(*quantize_symmetric(rows, form=INT8)))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
