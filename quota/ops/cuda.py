"""The CUDA library: loading it where torch has CUDA, and its implementations of the ops. Kernels: csrc/cuda; what runs
where: docs/cuda.md."""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quota.core.registry import Context
from quota.ops.calls import Calls
from quota.ops.placement import to_host
from quota.ops.weights import PackedWeight, dense

LIBRARY = Path(__file__).resolve().parents[1] / "_native" / "libquota_cuda.so"
BUILD = "build it with: QUOTA_BUILD=cuda pip install --no-build-isolation -e . (needs nvcc 13)"
WAYS = ("choose", "few4", "few8", "tile4", "tile8", "warpgroup")  # quota::cuda::Way
OLDEST = (8, 0)

_library: Any = None


def load_failure(path: Path = LIBRARY, namespace: str = "quota_cuda") -> str | None:
    """Load the library at `path`, whose ops torch knows as `namespace`; None, or why it cannot be loaded."""
    global _library
    if not path.exists():
        return f"the CUDA library is not built; {BUILD}"
    try:
        torch.ops.load_library(str(path))
        _library = getattr(torch.ops, namespace)
    except (OSError, RuntimeError) as error:
        return f"the CUDA library does not load ({str(error.__cause__ or error).splitlines()[0]}); {BUILD}"
    return None


@cache
def why_not(index: int = 0) -> str | None:
    """None when the library runs on GPU `index`, else the first reason it cannot: a missing device is said only of a
    library that loads."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if _library is None and (reason := load_failure()):
        return reason
    if index >= torch.cuda.device_count():
        return f"there is no CUDA device {index} (torch sees {torch.cuda.device_count()})"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; the library"
            " needs 8.0 or newer"
        )
    try:
        _library.check_device(index)
    except RuntimeError as error:
        return (
            f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}:"
            f" {str(error).splitlines()[0]}"
        )
    return None


def supports(ctx: Context) -> str | None:
    """As `quota.core.registry.Implementation`."""
    if ctx.device == "cpu":
        return why_not() or "for GPUs; the tensors are on the CPU"
    return why_not(ctx.index) if ctx.device == "cuda" else f"for CUDA; the tensors are on {ctx.device}"


_calls = Calls(lambda: _library, attrgetter("rows"))
transform, quantize_act = _calls.transform, _calls.quantize_act
kv4_append, qkv_append = _calls.kv4_append, _calls.qkv_append
kv4_attention, kv4_paged_attention = _calls.kv4_attention, _calls.kv4_paged_attention


def _packed(weight: PackedWeight) -> tuple[Tensor, ...]:
    layout = weight.layouts.get("cuda")
    if layout is None:
        layout = weight.layouts["cuda"] = tuple(_library.w4a4_pack(weight.codes(), weight.k))
        to_host(weight.w_q)
    return layout


def w4a4_linear(
    x_q: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    x_zero: Tensor | None = None,
    way: str = "choose",
) -> Tensor:
    """way: one of `WAYS`, for tests and benchmarks; all give the same bits."""
    blocks, col_sum = _packed(weight)
    return _library.w4a4_linear(
        x_q.contiguous(),
        x_scale.contiguous(),
        blocks,
        col_sum,
        weight.w_scale,
        weight.k,
        dense(bias),
        dense(x_zero),
        WAYS.index(way),
    )
