"""Linear layer of weights alone: codes in groups, float activations."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from quota import ops
from quota.core.formats import INT4_GROUPS, WEIGHT_ONLY, Format, Scheme
from quota.nn.linear import LinearSpec, RoundedLinear, Shapes, as_dtype_of, without_grad
from quota.nn.mlp import activated
from quota.quant.grouped import dequantize_groups, round_groups
from quota.quant.pack import pack_uint4, unpack_uint4

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


class WeightLinear(RoundedLinear):
    """y = (x * input_scale) w^T + bias with w = (q - zero) * scale, in G groups along K.

    Buffers, which are also the checkpoint's tensors: `w_q` [N, ceil(K/2)] uint8 (two codes, low = even k),
    `w_scale` float32 and `w_zero` uint8 [N, G], `bias` [N] float32 or absent, `input_scale` [K] float32 or
    absent (AWQ's, where no module before could take it).
    """

    OPS = (ops.w4a16_linear,)
    w_q: Tensor
    w_scale: Tensor
    w_zero: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        input_scale: bool = False,
        device: Any = None,
        scheme: Scheme = WEIGHT_ONLY,
    ) -> None:
        super().__init__()
        if scheme.weights is None or not scheme.weights.stored_as(INT4_GROUPS) or scheme.activations is not None:
            raise ValueError(
                f"scheme {scheme.name}: expected weights stored as {INT4_GROUPS.words()} and float activations, got"
                f" {scheme}"
            )
        self.scheme, self.weights = scheme, scheme.weights
        self.in_features, self.out_features = in_features, out_features
        float32: Any = {"dtype": torch.float32, "device": device}
        shape = (out_features, self.weights.groups(in_features))
        self.register_buffer(
            "w_q", torch.zeros(out_features, self.weights.code_bytes(in_features), dtype=torch.uint8, device=device)
        )
        self.register_buffer("w_scale", torch.zeros(shape, **float32))
        self.register_buffer("w_zero", torch.zeros(shape, dtype=torch.uint8, device=device))
        self.register_buffer("bias", torch.zeros(out_features, **float32) if bias else None)
        self.register_buffer("input_scale", torch.ones(in_features, **float32) if input_scale else None)
        self._grouped: ops.GroupedWeight | None = None

    @classmethod
    def build(cls, spec: LinearSpec, scheme: Scheme, shapes: Shapes | None) -> Self:
        """Scales its input where the checkpoint holds an `input_scale`."""
        scaled = f"{spec.path}.input_scale" in (shapes or {})
        return cls(
            spec.in_features, spec.out_features, bias=spec.bias, input_scale=scaled, device=spec.device, scheme=scheme
        )

    @staticmethod
    def rounded(weight: Tensor, form: Format) -> dict[str, Tensor]:
        return WeightLinear.of_codes(*round_groups(weight.float(), form))

    @staticmethod
    def of_codes(q: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        return {"w_q": pack_uint4(q), "w_scale": scale, "w_zero": zero}

    @staticmethod
    def value(tensors: dict[str, Tensor], form: Format, k: int) -> Tensor:
        return dequantize_groups(unpack_uint4(tensors["w_q"], k), tensors["w_scale"], tensors["w_zero"], form)

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
    def forward(self, x: Tensor, prologue: str | None = None) -> Tensor:
        """x [..., K] any float dtype -> [..., N] in the same dtype; all arithmetic is float32. prologue: as of
        `QuantLinear.forward`."""
        rows = x.reshape(-1, x.shape[-1])
        if prologue is not None:
            rows = activated(rows.float(), prologue)
        if rows.dtype not in _NATIVE_DTYPES or self.input_scale is not None:
            rows = rows.float()
        if self.input_scale is not None:
            rows = rows * self.input_scale
        return as_dtype_of(ops.w4a16_linear(rows, self.grouped, self.bias).view(*x.shape[:-1], self.out_features), x)

    def dequantized_weight(self) -> Tensor:
        """[N, K] float32, of the scaled input where there is an `input_scale`."""
        return self.value({**self.stored(), "w_q": self.grouped.codes()}, self.weights, self.in_features)

    def extra_repr(self) -> str:
        scaled = self.input_scale is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" input_scale={scaled}"
        )
