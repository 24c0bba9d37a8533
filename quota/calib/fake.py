"""Fake quantizers: rounding on a grid and back, with straight-through gradients, and the search for their clips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quota.core.formats import INT4, KV4, Format
from quota.quant.affine import SMALLEST_RANGE, symmetric_scale

MAX_CLIP = 0.995  # a sigmoid never reaches 1; the search treats anything above as "no clipping"
_GRID = tuple(0.40 + 0.05 * i for i in range(12)) + (MAX_CLIP,)


class _FakeAffine(torch.autograd.Function):
    """q = clamp(round((x - zero) / scale)); returns q * scale + zero, rounding passes gradients straight through.

    Masks are 0.0 and 1.0: on a CPU a comparison that writes floats in place, and a product with them, take a fifth of
    what booleans take.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
        ratio = (x if zero is None else x - zero) * (1.0 / scale)
        inside = torch.round(ratio)
        q = inside.clamp(low, high)
        inside.eq_(q)
        ratio.mul_(inside)
        ctx.save_for_backward(torch.sub(q, ratio, out=ratio), inside)
        ctx.has_zero, ctx.scale_shape = zero is not None, scale.shape
        q.mul_(scale)
        return q if zero is None else q.add_(zero)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        residual, inside = ctx.saved_tensors
        grad = grads[0]
        grad_x = grad * inside
        grad_scale = (grad * residual).sum_to_size(ctx.scale_shape)
        grad_zero = (grad - grad_x).sum_to_size(ctx.scale_shape) if ctx.has_zero else None
        return grad_x, grad_scale, grad_zero, None, None


class _Extreme(torch.autograd.Function):
    """x.amax(-1, keepdim=True), or amin; ties share the gradient, as there, but the mask is one of floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: bool) -> Tensor:
        reach = x.amax(-1, keepdim=True) if largest else x.amin(-1, keepdim=True)
        ctx.save_for_backward(x, reach)
        return reach

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, reach = ctx.saved_tensors
        reached = x.clone().eq_(reach)
        return reached.mul_(grads[0] / reached.sum(-1, keepdim=True)), None


def _round_trip(x: Tensor, scale: Tensor, zero: Tensor | None, form: Format) -> Tensor:
    if torch.is_grad_enabled():
        return _FakeAffine.apply(x, scale, zero, form.low, form.high)
    q = ((x if zero is None else x - zero) * (1.0 / scale)).round_().clamp_(form.low, form.high).mul_(scale)
    return q if zero is None else q.add_(zero)


def _symmetric(x: Tensor, reach: Tensor, clip: Tensor | float, form: Format) -> Tensor:
    return _round_trip(x, symmetric_scale(reach, clip, form)[..., None], None, form)


def _asymmetric(x: Tensor, low: Tensor, high: Tensor, clip: Tensor | float, form: Format) -> Tensor:
    zero = low * clip
    return _round_trip(x, (high * clip - zero).clamp_min(SMALLEST_RANGE) / form.steps, zero, form)


def _reach(x: Tensor) -> Tensor:
    return _Extreme.apply(x.abs(), True)


def fake_symmetric(x: Tensor, clip: Tensor | float, form: Format = INT4) -> Tensor:
    """`quota.quant.affine.quantize_symmetric` and back: codes of `form` over the last dimension of float x [..., K],
    `clip` a number or [...]. Gradients reach x and clip."""
    return _symmetric(x, _reach(x), clip, form)


def fake_asymmetric(x: Tensor, clip: Tensor | float, form: Format = KV4) -> Tensor:
    """`quota.quant.affine.quantize_kv` and back, whose formulas `_asymmetric` repeats on tensors that gradients pass:
    codes of `form` over the last dimension, as the KV cache stores them. `clip`: a number."""
    return _asymmetric(x, _Extreme.apply(x, False), _Extreme.apply(x, True), clip, form)


@torch.no_grad()
def search_clip(x: Tensor, form: Format = INT4) -> float:
    """The grid clip with the least squared quantization error over all rows of x [..., K]."""
    if form.symmetric:
        reach = x.abs().amax(-1, keepdim=True)
        tried = (_symmetric(x, reach, clip, form) for clip in _GRID)
    else:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        tried = (_asymmetric(x, low, high, clip, form) for clip in _GRID)
    errors = torch.stack([fake.sub_(x).double().square().sum() for fake in tried])
    return _GRID[int(errors.argmin())]


@torch.no_grad()
def search_weight_clip(w: Tensor, form: Format = INT4) -> Tensor:
    """Per row of w [N, K]: the grid clip with the least squared rounding error -> [N]."""
    reach = w.abs().amax(-1, keepdim=True)
    errors = torch.stack([_symmetric(w, reach, clip, form).sub_(w).square().sum(-1) for clip in _GRID])
    return torch.tensor(_GRID, dtype=w.dtype, device=w.device)[errors.argmin(0)]


def clip_logit(clip: Tensor | float) -> Tensor:
    return torch.logit(torch.as_tensor(clip, dtype=torch.float32).clamp(0.05, MAX_CLIP))
