"""The native CPU library: loading it, choosing its instruction set, and its implementations of the ops.

The library is optional. Without it every op runs its reference, after one warning that says why and how to build it.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quota.core.env import forced_cpu_isa
from quota.core.errors import UsageError
from quota.core.malloc import release_pages
from quota.core.registry import Context, ops
from quota.ops.calls import Calls
from quota.ops.weights import ByteWeight, FloatWeight, GroupedWeight, Kv, PackedWeight, dense

_LIBRARY = Path(__file__).resolve().parents[1] / "_native" / "libquota_cpu.so"
_PANEL, _GROUP, _STEP = 64, 4, 64  # as csrc/include/quota/kernels.h
_BUILD = "build it with: QUOTA_BUILD=cpu pip install --no-build-isolation -e . (needs a C++ compiler)"


class _Bound:
    """The library's functions, each looked up once, and the instruction set in use."""

    isa: str = ""

    def __getattr__(self, op: str) -> Any:
        found = getattr(torch.ops.quota_cpu, op).default
        setattr(self, op, found)
        return found


_bound = _Bound()


def _load_failure() -> str | None:
    if not _LIBRARY.exists():
        return f"the native CPU library is not built; {_BUILD}"
    try:
        torch.ops.load_library(str(_LIBRARY))
        for op in ops():  # one that lacks an op is older than this code
            if op in globals():
                getattr(_bound, op)
    except (OSError, AttributeError, RuntimeError) as error:
        return f"the native CPU library does not load ({str(error).splitlines()[0]}); {_BUILD}"
    return None


@cache
def _load() -> str | None:
    reason = _load_failure()
    if reason:
        warnings.warn(f"quota runs its slow reference implementations: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def supported_isas() -> tuple[str, ...]:
    """Instruction sets of the library that this CPU has, best first; empty without the library."""
    if _load():
        return ()
    return tuple(torch.ops.quota_cpu.isas().split(","))


def set_isa(isa: str | None) -> str:
    """Use this instruction set from now on (None: the best). Returns its name; UsageError when the CPU or the build
    lacks it."""
    available = supported_isas()
    if isa is not None and isa not in available:
        raise UsageError(f"QUOTA_CPU_ISA: {isa!r} cannot run here; available: {', '.join(available) or 'none'}")
    _bound.isa = isa or available[0]
    torch.ops.quota_cpu.use_isa(_bound.isa)
    return _bound.isa


def why_not() -> str | None:
    """None when the native implementations can run, else the reason. UsageError when QUOTA_CPU_ISA asks for what this
    CPU lacks."""
    reason = _load()
    if reason is None and not _bound.isa:
        set_isa(forced_cpu_isa())
    return reason


def supports(ctx: Context) -> str | None:
    """As `quota.core.registry.Implementation`."""
    return why_not() if ctx.device == "cpu" else f"a CPU library; the tensors are on {ctx.device}"


def describe() -> str:
    """One line: the library and its instruction set, or why it is not used."""
    reason = why_not()
    return reason or f"native CPU library, instruction set {_bound.isa} (this CPU runs: {', '.join(supported_isas())})"


_calls = Calls(lambda: _bound, attrgetter("panels"))
transform, quantize_act = _calls.transform, _calls.quantize_act
kv4_append, qkv_append = _calls.kv4_append, _calls.qkv_append
kv4_attention, kv4_paged_attention = _calls.kv4_attention, _calls.kv4_paged_attention


def _packed(weight: PackedWeight) -> tuple[Tensor, ...]:
    layout = weight.layouts.get("native")
    if layout is None:
        layout = weight.layouts["native"] = tuple(_bound.w4a4_pack(weight.w_q, weight.k))
        release_pages(
            weight.w_q.data_ptr(), weight.w_q.numel()
        )  # from here on it is read only to be saved: no second copy in memory
    return layout


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _bound.rms_norm(x.contiguous(), weight.contiguous(), eps)


def w4a4_linear(
    x_q: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None = None, x_zero: Tensor | None = None
) -> Tensor:
    blocks, col_sum = _packed(weight)
    return _bound.w4a4_linear(
        x_q.contiguous(), x_scale.contiguous(), blocks, col_sum, weight.w_scale, weight.k, dense(bias), dense(x_zero)
    )


def token_score(
    q: Tensor, k: Tensor | Kv, lse: Tensor, text: Tensor, visual: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    keys = (k.contiguous(), None, None, None) if isinstance(k, Tensor) else (None, *k)
    return _bound.token_score(q.contiguous(), *keys, lse.contiguous(), text.contiguous(), visual.contiguous(), scaling)


def token_select(score: Tensor, eligible: Tensor, keep: Tensor) -> Tensor:
    return _bound.token_select(score.contiguous(), eligible.contiguous(), keep.contiguous())


def token_gather(x: Tensor, index: Tensor) -> Tensor:
    width = math.prod(x.shape[2:])
    if width == 0:
        return x.new_empty(*index.shape, *x.shape[2:])
    rows = x.reshape(*x.shape[:2], width).contiguous().view(torch.uint8)  # bytes, whatever they mean
    return _bound.token_gather(rows, index.contiguous()).view(x.dtype).view(*index.shape, *x.shape[2:])


def float_linear(x: Tensor, weight: FloatWeight) -> Tensor:
    panels = weight.layouts.get("native")
    if panels is None:
        n, k = weight.w.shape
        count = -(-n // _PANEL)
        panels = weight.w.new_zeros(
            count * _PANEL, k, dtype=weight.w.dtype if weight.w.dtype == torch.bfloat16 else torch.float32
        )
        panels[:n] = weight.w
        panels = weight.layouts["native"] = panels.view(count, _PANEL, k).transpose(1, 2).contiguous()
    return _bound.float_linear(x.contiguous(), panels, weight.w.shape[0])


def w4a16_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None = None) -> Tensor:
    layout = weight.layouts.get("native")
    if layout is None:
        layout = weight.layouts["native"] = weight.panels(_PANEL)
        release_pages(weight.w_q.data_ptr(), weight.w_q.numel())
    y = _bound.w4a16_linear(x.float().contiguous(), *layout, weight.n, dense(bias))
    return y if y.dtype == x.dtype else y.to(x.dtype)


def kv4_page_write(pages: Kv, rows: Kv, slot: Tensor) -> None:
    _bound.kv4_page_write(*pages, *(t.contiguous() for t in rows), slot.contiguous())


def kv4_page_read(pages: Kv, table: Tensor, length: Tensor, capacity: int) -> Kv:
    return _bound.kv4_page_read(*pages, table.contiguous(), length.contiguous(), capacity)


def kv16_attention(
    q: Tensor, k: Tensor, v: Tensor, length: int, start: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    return _bound.kv16_attention(q.contiguous(), k, v, length, dense(start), scaling)


def kv16_paged_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return _bound.kv16_paged_attention(q.contiguous(), k, v, table.contiguous(), length.contiguous(), scaling)


def w8a8_linear(x: Tensor, weight: ByteWeight, bias: Tensor | None = None) -> Tensor:
    if x.shape[-1] != weight.w_q.shape[1]:
        raise ValueError(f"x: expected rows of {weight.w_q.shape[1]} features, got {list(x.shape)}")
    blocks = weight.layouts.get("native")
    if blocks is None:
        blocks = weight.layouts["native"] = weight.panels(_PANEL, _GROUP, _STEP)
        release_pages(weight.w_q.data_ptr(), weight.w_q.numel())
    return _bound.w8a8_linear(x.contiguous(), blocks, weight.w_scale, dense(bias))
