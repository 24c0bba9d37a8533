"""W4A4 linear layer: one projection group, that is one input transform, one activation clip and the fused rows that
read it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn

from quota import ops
from quota.core.errors import CheckpointError
from quota.core.formats import DEFAULT, INT4, Format, Scheme
from quota.core.registry import Op
from quota.quant.affine import quantize_weight
from quota.quant.fixed import rounded_factor
from quota.quant.pack import unpack_int4
from quota.quant.transform import decompose, hadamard, inverse_on_weight

Shapes = Mapping[str, tuple[int, ...]]
P = ParamSpec("P")
R = TypeVar("R")


def without_grad(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad()` that costs nothing where gradients are off already: a decode step passes eight of these per
    layer."""
    guarded = torch.no_grad()(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return guarded(*args, **kwargs) if torch.is_grad_enabled() else function(*args, **kwargs)

    return call


def as_float32(x: Tensor) -> Tensor:
    """`x.float()`, without a call into torch where there is nothing to do."""
    return x if x.dtype == torch.float32 else x.float()


def as_dtype_of(y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype of x, as `as_float32`."""
    return y if y.dtype == x.dtype else y.to(x.dtype)


class Float32State(nn.Module):
    """A module whose floating buffers are part of a format: `half()`, `bfloat16()` and `to(dtype)` move them but never
    round them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                device = fn(torch.zeros(0, device=buffer.device)).device
                self._buffers[name] = (
                    torch.empty_like(buffer, device=device)
                    if buffer.is_meta and device.type != "meta"
                    else buffer.to(device)
                )
        self.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def forget(self) -> None:
        """Drop whatever was derived from the buffers; it is derived again when needed. Call it after writing into a
        buffer."""


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer to be built: its path in the model, its size, and, for an output projection of attention, the
    heads whose outputs it reads."""

    path: str
    in_features: int
    out_features: int
    bias: bool
    heads: int | None = None
    device: torch.device | str | None = None


class SchemeLinear(Float32State):
    """A linear layer of a scheme: [..., K] -> [..., N], a row's bits independent of the other rows. Its buffers are the
    checkpoint's tensors."""

    OPS: ClassVar[tuple[Op, ...]]  # that `forward` calls
    scheme: Scheme
    in_features: int
    out_features: int

    @classmethod
    @abstractmethod
    def build(cls, spec: LinearSpec, scheme: Scheme, shapes: Shapes | None) -> Self:
        """An empty layer. shapes: of all tensors of the checkpoint that will be loaded, which decide what is optional;
        None: the scheme's defaults. CheckpointError for impossible ones."""

    @abstractmethod
    def round_from(self, weight: Tensor, bias: Tensor | None, clip: float = 1.0) -> None:
        """Fill it from a float weight [N, K] by rounding to nearest. clip in (0, 1]: of activations."""

    @abstractmethod
    def forward(self, x: Tensor, prologue: str | None = None) -> Tensor:
        """x [..., K] any float dtype -> [..., N] in the same dtype. prologue: an activation that is applied to x first,
        one of `ops.quantize_act`'s; "silu_mul" takes x [..., 2 K]."""

    @abstractmethod
    def dequantized_weight(self) -> Tensor:
        """[N, K] float32, of the input as the layer transforms or scales it."""


class RoundedLinear(SchemeLinear):
    """A linear layer whose weight is rounded as it is. Its tensors by name, without bias: `rounded` makes them, `value`
    reads them."""

    weights: Format
    bias: Tensor | None

    @staticmethod
    @abstractmethod
    def rounded(weight: Tensor, form: Format) -> dict[str, Tensor]:
        """float [N, K] -> the tensors, rounded to nearest."""

    @staticmethod
    def of_codes(q: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """Codes uint8 [N, K] that count from 0, scale and zero [N, G] of a search -> the tensors. TypeError where no
        search makes the format's codes."""
        raise TypeError("of_codes: expected a format of integer codes; no method makes others from a search")

    @staticmethod
    @abstractmethod
    def value(tensors: dict[str, Tensor], form: Format, k: int) -> Tensor:
        """The tensors -> float32 [N, K]."""

    def stored(self) -> dict[str, Tensor]:
        """The tensors of this layer."""
        return {name: tensor for name, tensor in self._buffers.items() if name.startswith("w_") and tensor is not None}

    def round_from(self, weight: Tensor, bias: Tensor | None, clip: float = 1.0) -> None:
        """As `SchemeLinear`; activations are not clipped."""
        self.round_parts([weight], bias)

    @torch.no_grad()
    def round_parts(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        """As `round_from`, of weights whose rows lie one below the other, each rounded for itself."""
        parts = [self.rounded(weight, self.weights) for weight in weights]
        for name in parts[0]:
            getattr(self, name).copy_(torch.cat([part[name] for part in parts]))
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)
        self.forget()

    def dequantized_weight(self) -> Tensor:
        """As `SchemeLinear`."""
        return self.value(self.stored(), self.weights, self.in_features)


class QuantLinear(SchemeLinear):
    """y = dequant(Qa(x (left kron right))) w^T + bias with weights and activations in signed codes of two to a byte.

    Buffers, which are also the checkpoint's tensors: `left` [l, l] and `right` [r, r] float32 (each may be absent; l *
    r == K),
    `clip` float32 scalar, `w_q` [N, ceil(K/2)] uint8 (two nibbles, low = even k), `w_scale` [N] float32, `bias` [N]
    float32 or absent.
    The weight is already expressed in the transformed basis.
    """

    OPS = (ops.quantize_act, ops.w4a4_linear)
    left: Tensor | None
    right: Tensor | None
    clip: Tensor
    w_q: Tensor
    w_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        left: int | None = None,
        right: int | None = None,
        device: torch.device | str | None = None,
        scheme: Scheme = DEFAULT,
    ) -> None:
        super().__init__()
        if scheme.weights is None or not scheme.weights.stored_as(INT4) or scheme.activations != INT4:
            raise ValueError(
                f"scheme {scheme.name}: expected weights stored as int4 and activations int4, got {scheme}"
            )
        self.scheme, self.weights = scheme, scheme.weights
        self.in_features, self.out_features = in_features, out_features
        left, right = left or None, right or None
        _check_factors(in_features, left, right)
        float32: Any = {
            "dtype": torch.float32,
            "device": device,
        }  # whatever the default dtype is while a model is being built
        self.register_buffer("left", None if left is None else torch.zeros(left, left, **float32))
        self.register_buffer("right", None if right is None else torch.zeros(right, right, **float32))
        self.register_buffer("clip", torch.ones((), **float32))
        self.register_buffer(
            "w_q", torch.zeros(out_features, self.weights.code_bytes(in_features), dtype=torch.uint8, device=device)
        )
        self.register_buffer("w_scale", torch.zeros(out_features, **float32))
        self.register_buffer("bias", torch.zeros(out_features, **float32) if bias else None)
        self.forget()

    @classmethod
    def build(cls, spec: LinearSpec, scheme: Scheme, shapes: Shapes | None) -> Self:
        """Default factors: [heads, heads] on the left of an output projection, else two of sizes as equal as can be."""
        size = spec.in_features
        if shapes is not None:
            left, right = (_stored_factor(shapes, f"{spec.path}.{side}", size) for side in ("left", "right"))
            if left is not None and right is not None and left * right != size:
                raise CheckpointError(
                    f"tensor {spec.path}.left: expected left * right == {size} inputs, got {left} * {right}; the"
                    " checkpoint is damaged"
                )
        elif not scheme.transforms:
            left, right = None, None
        else:
            left, right = decompose(size) if spec.heads is None else (spec.heads, None)
        return cls(size, spec.out_features, bias=spec.bias, left=left, right=right, device=spec.device, scheme=scheme)

    @torch.no_grad()
    def round_from(self, weight: Tensor, bias: Tensor | None, clip: float = 1.0) -> None:
        """As `SchemeLinear`; Hadamard factors, rounded to fixed point, where it has any."""
        for factor in (self.left, self.right):
            if factor is not None:
                factor.copy_(rounded_factor(hadamard(factor.shape[0])))
        moved = inverse_on_weight(weight.double(), self.left, self.right).float()
        w_q, w_scale = quantize_weight(moved, form=self.weights)
        self.w_q.copy_(w_q)
        self.w_scale.copy_(w_scale)
        self.clip.fill_(clip)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)
        self.forget()

    def forget(self) -> None:
        self._packed: ops.PackedWeight | None = None
        self._clip: float | None = None
        self._factors: tuple[ops.Factor | None, ops.Factor | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_clip": None, "_factors": None}  # copies repack for themselves

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors (named as the buffers) in; absent ones keep their value."""
        for name, tensor in tensors.items():
            getattr(self, name).copy_(tensor)
        self.forget()

    @property
    def packed(self) -> ops.PackedWeight:
        """The weight in the layout the implementation wants, made at first use."""
        if self._packed is None:
            self._packed = ops.PackedWeight(self.w_q, self.w_scale, self.in_features)
        return self._packed

    @property
    def factors(self) -> tuple[ops.Factor | None, ops.Factor | None]:
        """`left` and `right` in fixed point, made at first use."""
        if self._factors is None:
            self._factors = ops.factor_of(self.left), ops.factor_of(self.right)
        return self._factors

    @without_grad
    def forward(self, x: Tensor, prologue: str | None = None) -> Tensor:
        """As `SchemeLinear`; all arithmetic is int32 or float32."""
        rows = as_float32(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]))
        y = ops.w4a4_linear(*self._quantize(rows, prologue), self.packed, self.bias)
        return as_dtype_of(y if x.ndim == 2 else y.view(*x.shape[:-1], self.out_features), x)

    def _quantize(self, rows: Tensor, prologue: str | None = None) -> tuple[Tensor, Tensor]:
        if self._clip is None:
            self._clip = float(self.clip)
        return ops.quantize_act(rows, *self.factors, self._clip, prologue)

    @torch.no_grad()
    def dequantized_forward(self, x: Tensor) -> Tensor:
        """The same value from dequantized float64 operands: what `forward` must equal up to float32 rounding."""
        x_q, x_scale = self._quantize(self._rows(x))
        u = unpack_int4(x_q, self.in_features).double() * x_scale.double()[:, None]
        y = u @ self.dequantized_weight().double().T
        if self.bias is not None:
            y = y + self.bias.double()
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def dequantized_weight(self) -> Tensor:
        """[N, K] float32, in the transformed basis."""
        return unpack_int4(self.packed.codes(), self.in_features).float() * self.w_scale[:, None]

    @torch.no_grad()
    def quant_risk(self, x: Tensor) -> Tensor:
        """x [..., K] -> [...] float32: ||u - Qa(u)||_2 of the transformed input u under the deployed activation
        quantizer."""
        rows = self._rows(x)
        u = ops.transform(rows, *self.factors)
        x_q, x_scale = self._quantize(rows)
        return row_norm(u - unpack_int4(x_q, self.in_features).float() * x_scale[:, None]).view(x.shape[:-1])

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.in_features).float().contiguous()

    def extra_repr(self) -> str:
        left, right = (None if t is None else t.shape[0] for t in (self.left, self.right))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" left={left}, right={right}"
        )


def row_norm(x: Tensor) -> Tensor:
    """x [..., K] -> [...] float32, summed in float64 and rounded once, so that the order of summation cannot show."""
    return x.double().square().sum(-1).sqrt().float()


def _stored_factor(shapes: Shapes, name: str, in_features: int) -> int | None:
    shape = shapes.get(name)
    if shape is None:
        return None
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1 or in_features % shape[0]:
        raise CheckpointError(
            f"tensor {name}: expected a square matrix whose size divides {in_features}, got {list(shape)}; the"
            " checkpoint is damaged"
        )
    return shape[0]


def _check_factors(in_features: int, left: int | None, right: int | None) -> None:
    if (left is not None and in_features % left) or (right is not None and in_features % right):
        raise ValueError(
            f"transform: expected factors dividing {in_features} input features, got left {left} and right {right}"
        )
    if left is not None and right is not None and left * right != in_features:
        raise ValueError(f"transform: expected left * right == {in_features} input features, got {left} * {right}")
