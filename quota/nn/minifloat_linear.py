"""Linear layer of small floats, weights and activations: E4M3, or E2M1 in groups. Codes are widened and multiplied by
`float_linear`."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from quota import ops
from quota.core.formats import Format, Scheme
from quota.nn.linear import LinearSpec, RoundedLinear, Shapes, as_dtype_of, row_norm, without_grad
from quota.nn.mlp import activated
from quota.quant.minifloat import Coded, global_scale, quantize, stored_values


class MinifloatLinear(RoundedLinear):
    """y = dequant(Q(x)) dequant(w)^T + bias; products of codes and their groups' scales are exact, a chain over K adds
    them, and the scales of row and channel follow.

    Buffers, which are also the checkpoint's tensors: `w_q` uint8 [N, K] (E4M3) or [N, ceil(K/2)] (two E2M1 codes,
    low = even k); `w_scale` float32 [N], or uint8 [N, G]: bits of E4M3 (NVFP4) or exponents + 127 (MXFP4); `w_row`
    float32 [N], NVFP4 alone: what a channel is multiplied by besides; `bias` [N] float32 or absent.
    """

    OPS = (ops.float_linear,)
    w_q: Tensor
    w_scale: Tensor
    w_row: Tensor | None
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
        form = scheme.weights
        if form is None or form.number not in ("e4m3", "e2m1") or scheme.activations != form:
            raise ValueError(
                f"scheme {scheme.name}: expected weights and activations stored as small floats, got {scheme}"
            )
        self.weights, self.in_features, self.out_features = form, in_features, out_features
        n, float32 = out_features, {"dtype": torch.float32, "device": device}
        uint8: Any = {"dtype": torch.uint8, "device": device}
        self.register_buffer("w_q", torch.zeros(n, form.code_bytes(in_features), **uint8))
        whole = form.scale == "float32"
        scale = torch.zeros(n, **float32) if whole else torch.zeros(n, form.groups(in_features), **uint8)
        self.register_buffer("w_scale", scale)
        self.register_buffer("w_row", torch.zeros(n, **float32) if form.scale == "e4m3" else None)
        self.register_buffer("bias", torch.zeros(n, **float32) if bias else None)
        self._weight: tuple[ops.FloatWeight, Tensor | None] | None = None

    @classmethod
    def build(cls, spec: LinearSpec, scheme: Scheme, shapes: Shapes | None) -> Self:
        """Nothing is optional."""
        return cls(spec.in_features, spec.out_features, bias=spec.bias, device=spec.device, scheme=scheme)

    @staticmethod
    def rounded(weight: Tensor, form: Format) -> dict[str, Tensor]:
        """NVFP4's scale above the groups' is one of the whole weight."""
        weight = weight.float()
        whole = global_scale(weight.abs().amax()).expand(len(weight)) if form.scale == "e4m3" else None
        made = quantize(weight, form, whole)
        tensors = {"w_q": made.codes, "w_scale": made.scale}
        return tensors if whole is None else {**tensors, "w_row": whole.clone()}

    @staticmethod
    def value(tensors: dict[str, Tensor], form: Format, k: int) -> Tensor:
        values, row = _parts(tensors, form, k)
        return values if row is None else values * row[:, None]

    def forget(self) -> None:
        self._weight = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": None}

    @without_grad
    def forward(self, x: Tensor, prologue: str | None = None) -> Tensor:
        """As `SchemeLinear`."""
        if self._weight is None:
            values, row = _parts(self.stored(), self.weights, self.in_features)
            self._weight = ops.FloatWeight(values.bfloat16()), row
        weight, channel = self._weight
        rows = self._coded(activated(x.reshape(-1, x.shape[-1]).float(), prologue))
        y = ops.float_linear(rows.values.contiguous(), weight)
        y = y if channel is None else y * channel
        y = y if rows.row is None else y * rows.row[:, None]
        y = y if self.bias is None else y + self.bias
        return as_dtype_of(y.view(*x.shape[:-1], self.out_features), x)

    def _coded(self, rows: Tensor) -> Coded:
        return quantize(rows, self.weights)

    @torch.no_grad()
    def quant_risk(self, x: Tensor) -> Tensor:
        """As `QuantLinear.quant_risk`."""
        rows = x.reshape(-1, self.in_features).float()
        made = self._coded(rows)
        value = made.values if made.row is None else made.values * made.row[:, None]
        return row_norm(rows - value).view(x.shape[:-1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _parts(tensors: dict[str, Tensor], form: Format, k: int) -> tuple[Tensor, Tensor | None]:
    """float32 values [N, K] of codes and groups' scales, and the channels' scale [N], None where there is none."""
    row = tensors["w_scale"] if form.scale == "float32" else tensors.get("w_row")
    return stored_values(tensors["w_q"], tensors["w_scale"], form, k), row
