"""The Triton kernels (`kernels/quota_kernels`) as implementations of the ops: on CUDA devices, and in Triton's
interpreter on the CPU for tests."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from quota.core.env import triton_interpreted
from quota.core.registry import Context
from quota.ops.placement import to_host
from quota.ops.weights import ByteWeight, Factor, FloatWeight, GroupedWeight, Kv, PackedWeight

_CHECKOUT = Path(__file__).resolve().parents[2] / "kernels"
_OLDEST = (8, 0)  # int8 matrix products of the shapes used here, and asynchronous copies


@cache
def why_not() -> str | None:
    """None when the kernels can be imported, else the reason."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install -e '.[gpu]' in the clone"
    if find_spec("quota_kernels") is None and (_CHECKOUT / "quota_kernels").is_dir():
        sys.path.append(str(_CHECKOUT))  # quota runs from its repository, where nothing is installed
    return (
        None
        if find_spec("quota_kernels")
        else "the package quota_kernels is missing: install quota with pip, from its repository or as a wheel"
    )


def supports(ctx: Context) -> str | None:
    """As `quota.core.registry.Implementation`."""
    reason = why_not()
    if reason is None and ctx.device not in ("cpu", "cuda"):
        return f"for CUDA; the tensors are on {ctx.device}"
    if reason is None and ctx.device == "cpu":
        return (
            None
            if triton_interpreted()
            else "needs a CUDA device; on the CPU it runs only in Triton's interpreter (TRITON_INTERPRET=1), for tests"
        )
    if reason is None and ctx.device == "cuda":
        import torch

        capability = torch.cuda.get_device_capability(ctx.index)
        if capability < _OLDEST:
            return (
                f"needs compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer, device {ctx.index} has"
                f" {capability[0]}.{capability[1]}"
            )
    return reason


@cache
def _kernel(op: str) -> Any:
    return getattr(import_module(f"quota_kernels.{op}"), op)


def _factors(left: Factor | None, right: Factor | None) -> tuple[Tensor | None, Tensor | None, int]:
    exponent = sum(f.exponent for f in (left, right) if f is not None)
    return *(None if f is None else f.fixed for f in (left, right)), exponent  # type: ignore[return-value]


def transform(x: Tensor, left: Factor | None, right: Factor | None) -> Tensor:
    return _kernel("transform")(x, *_factors(left, right))


def quantize_act(
    x: Tensor, left: Factor | None, right: Factor | None, clip: float, prologue: str | None = None
) -> tuple[Tensor, Tensor]:
    return _kernel("quantize_act")(x, *_factors(left, right), clip, prologue)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _kernel("rms_norm")(x, weight, eps)


def w4a4_linear(
    x_q: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None = None, x_zero: Tensor | None = None
) -> Tensor:
    zero = None
    if x_zero is not None:
        layout = weight.layouts.get("triton")
        if layout is None:
            layout = weight.layouts["triton"] = (
                import_module("quota_kernels.w4a4_linear").column_sums(weight.codes()),
            )
        zero = (x_zero, layout[0])
    return _kernel("w4a4_linear")(x_q, x_scale, weight.codes(), weight.w_scale, bias, zero)


def w4a16_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None = None) -> Tensor:
    layout = weight.layouts.get("triton")
    if layout is None:
        layout = weight.layouts["triton"] = weight.panels(import_module("quota_kernels.w4a16_linear").PANEL)
        to_host(weight.w_q)
    return _kernel("w4a16_linear")(x, *layout, weight.n, bias)


def float_linear(x: Tensor, weight: FloatWeight) -> Tensor:
    columns = weight.layouts.get("triton")
    if columns is None:
        columns = weight.layouts["triton"] = weight.w.T.contiguous()  # neighbouring outputs are read together
    return _kernel("float_linear")(x, columns)


def kv4_append(cache_q: Tensor, cache_scale: Tensor, cache_zero: Tensor, x: Tensor, position: int, clip: float) -> None:
    _kernel("kv4_append")(cache_q, cache_scale, cache_zero, x, position, clip)


def qkv_append(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    transforms: tuple[Factor | None, Factor | None],
    k: Kv,
    v: Kv,
    position: int,
    clips: tuple[float, float],
) -> Tensor:
    matrices = tuple(None if f is None else f.fixed for f in transforms)
    exponents = tuple(0 if f is None else f.exponent for f in transforms)
    return _kernel("qkv_append")(qkv, rotary, matrices, exponents, k, v, position, clips)


def kv4_attention(
    q: Tensor, k: Kv, v: Kv, length: int, start: Tensor | None, scaling: float, shared: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _kernel("kv4_attention")(q, k, v, length, start, scaling, shared)


def kv4_paged_attention(
    q: Tensor, k: Kv, v: Kv, table: Tensor, length: Tensor, scaling: float, shared: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _kernel("kv4_paged_attention")(q, k, v, table, length, scaling, shared)


def kv4_page_write(pages: Kv, rows: Kv, slot: Tensor) -> None:
    _kernel("kv4_page_write")(pages, rows, slot)


def kv4_page_read(pages: Kv, table: Tensor, length: Tensor, capacity: int) -> Kv:
    return _kernel("kv4_page_read")(pages, table, length, capacity)


def token_score(
    q: Tensor, k: Tensor | Kv, lse: Tensor, text: Tensor, visual: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return _kernel("token_score")(q, k, lse, text, visual, scaling)


def token_select(score: Tensor, eligible: Tensor, keep: Tensor) -> Tensor:
    return _kernel("token_select")(score, eligible, keep)


def token_gather(x: Tensor, index: Tensor) -> Tensor:
    return _kernel("token_gather")(x, index)


def kv16_attention(
    q: Tensor, k: Tensor, v: Tensor, length: int, start: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    return _kernel("kv16_attention")(q, k, v, length, start, scaling)


def kv16_paged_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return _kernel("kv16_paged_attention")(q, k, v, table, length, scaling)


def w8a8_linear(x: Tensor, weight: ByteWeight, bias: Tensor | None = None) -> Tensor:
    return _kernel("w8a8_linear")(x, weight.w_q, weight.w_scale, bias)
