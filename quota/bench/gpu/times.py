"""Times on the device beside other libraries: graphs of calls between events, inputs rotated past the second-level cache, medians."""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quota.bench.gpu.checks import kv_of
from quota.bench.gpu.peers import cublaslt_runs, humming_runs
from quota.bench.shapes import MODELS, Attention, Linear
from quota.ops import cuda, triton
from quota.ops.w4a4_linear import PackedWeight
from quota.ops.w4a16_linear import GroupedWeight
from quota.quant.affine import quantize_weight
from quota.quant.grouped import round_groups
from quota.quant.pack import pack_uint4
from quota.quant.transform import decompose, hadamard

ROWS = (1, 4, 16, 64, 173, 640, 2048)
FEW_ROWS = (1, 16, 640)
CONTEXTS = ((1, 700), (8, 4096), (8, 16384), (16, 16384))  # batch, slots
FULL = tuple(m for m in MODELS if m.name in ("llava-1.5-7b", "qwen2.5-vl-7b"))
DEVICE = "cuda"
Run = Callable[[], object]


def median_us(runs: Sequence[Run], repeats: int = 20) -> float:
    """Median microseconds per call of `runs`, the same call on different buffers, captured as one graph and replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs:  # loads modules and asks for shared memory outside the capture
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    samples = []
    for i in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            samples.append(1e3 * begin.elapsed_time(end) / len(runs))
    return statistics.median(samples)


def copies(bytes_each: int) -> int:
    """How many sets of inputs are three times the second-level cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, -(-3 * cache // max(1, bytes_each))))


def timed(name: str, runs: Sequence[Run] | Callable[[], Sequence[Run]]) -> dict[str, Any]:
    """A peer that fails, or whose calls cannot be made, is reported, and the others go on."""
    try:
        return {"implementation": name, "us": median_us(runs() if callable(runs) else runs)}
    except Exception as error:
        torch.cuda.synchronize()
        return {"implementation": name, "failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def _weight(shape: Linear) -> PackedWeight:
    return PackedWeight(*quantize_weight(_random(shape.n, shape.k)), shape.k)


def _grouped(shape: Linear) -> GroupedWeight:
    q, scale, zero = round_groups(_random(shape.n, shape.k))
    return GroupedWeight(pack_uint4(q), scale, zero, shape.k)


def linear_rows(shape: Linear, m: int) -> Iterator[dict[str, Any]]:
    """w4a4_linear beside bf16, int8 and FP8 products of the same size."""
    n, k = shape.n, shape.k
    count = copies(n * k // 2)
    weights = [_weight(shape)]
    weights += [PackedWeight(weights[0].w_q.clone(), weights[0].w_scale, k) for _ in range(count - 1)]
    x = _random(m, k)
    x_q, x_scale = cuda.quantize_act(x, None, None, 1.0)
    yield timed("quota", [partial(cuda.w4a4_linear, x_q, x_scale, w) for w in weights])

    def with_input(w: PackedWeight) -> Tensor:
        return cuda.w4a4_linear(*cuda.quantize_act(x, None, None, 1.0), w)

    yield timed("quota+quantize", [partial(with_input, w) for w in weights])
    yield timed("quota-triton", [partial(triton.w4a4_linear, x_q, x_scale, w) for w in weights])
    del weights
    grouped = [_grouped(shape)]
    grouped += [GroupedWeight(grouped[0].w_q.clone(), grouped[0].w_scale, grouped[0].w_zero, k) for _ in range(count - 1)]
    yield timed("quota-triton-w4a16", [partial(triton.w4a16_linear, x.half(), w) for w in grouped])
    del grouped
    count = copies(2 * n * k)
    half, w_half = x.bfloat16(), [_random(n, k, dtype=torch.bfloat16) for _ in range(count)]
    yield timed("cublas-bf16", [partial(torch.nn.functional.linear, half, w) for w in w_half])
    del w_half
    x8 = torch.randint(-8, 8, (m, k), device=DEVICE, dtype=torch.int8)
    w8 = [torch.randint(-8, 8, (n, k), device=DEVICE, dtype=torch.int8) for _ in range(copies(n * k))]
    yield timed("cublaslt-int8", partial(cublaslt_runs, x8, w8)) | {"note": "32 MiB of workspace, the heuristic's first algorithm, int32 out"}
    rows = max(m, 17)  # torch._int_mm wants more than 16
    wide = torch.randint(-8, 8, (rows, k), device=DEVICE, dtype=torch.int8)
    yield timed("torch._int_mm", [partial(torch._int_mm, wide, w.t()) for w in w8]) | {"note": f"{rows} rows, no workspace, int32 out"}
    one = torch.ones((), device=DEVICE)
    x_fp8, w_fp8 = x.to(torch.float8_e4m3fn), [w.to(torch.float8_e4m3fn).t() for w in w8]
    yield timed("fp8", [partial(torch._scaled_mm, x_fp8, w, one, one, out_dtype=torch.bfloat16) for w in w_fp8])


def humming_rows(shape: Linear, m: int) -> Iterator[dict[str, Any]]:
    """w4a4_linear beside humming's W4A8; the first call of every size compiles."""
    weight, x = _weight(shape), _random(m, shape.k)
    x_q, x_scale = cuda.quantize_act(x, None, None, 1.0)
    weights = [PackedWeight(weight.w_q.clone(), weight.w_scale, shape.k) for _ in range(copies(shape.n * shape.k // 2))]
    yield timed("quota", [partial(cuda.w4a4_linear, x_q, x_scale, w) for w in weights])
    runs = functools.cache(lambda: humming_runs(x.bfloat16(), _random(shape.n, shape.k, dtype=torch.bfloat16), len(weights)))
    yield from (timed(name, partial(lambda of: runs()[of], name)) for name in ("humming-w4a8", "humming-w4a8+quantize"))


def attention_rows(shape: Attention, batch: int, slots: int) -> Iterator[dict[str, Any]]:
    """Decode: one query per row over `slots` slots, beside attention on bf16 keys and values."""
    heads, kv_heads, d = shape.heads, shape.kv_heads, shape.head_dim
    q = _random(batch, heads, 1, d)
    one = [tuple(t.to(DEVICE) for t in kv_of(torch.randn(1, kv_heads, slots, d), slots)) for _ in range(2)]
    count = copies(batch * kv_heads * slots * (d + 16))
    caches: list[Any] = [[tuple(t.repeat(batch, *[1] * (t.ndim - 1)) for t in kv) for kv in one] for _ in range(count)]
    yield timed("quota", [partial(cuda.kv4_attention, q, c[0], c[1], slots, None, d**-0.5) for c in caches])
    del caches
    half = q.bfloat16()
    floats = [[_random(batch, kv_heads, slots, d, dtype=torch.bfloat16) for _ in range(2)] for _ in range(copies(4 * batch * kv_heads * slots * d))]

    def sdpa(keys: Tensor, values: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(half, keys, values, enable_gqa=heads != kv_heads)

    yield timed("sdpa-bf16", [partial(sdpa, *c) for c in floats])
    if importlib.util.find_spec("flash_attn") is None:
        yield {"implementation": "flash-attn", "failed": "flash-attn is not installed"}
        return
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found]

    turned = [[t.transpose(1, 2).contiguous() for t in c] for c in floats]
    yield timed("flash-attn", [partial(flash_attn_with_kvcache, half.transpose(1, 2), *c) for c in turned])


def layer_rows(m: int) -> Iterator[dict[str, Any]]:
    """What transforming and quantizing its inputs takes, beside the four linears of a layer."""
    for model in FULL:
        linears = quantizes = 0.0
        for shape in model.linears():
            l, r = decompose(shape.k)
            left, right = (hadamard(n).float().contiguous().to(DEVICE) for n in (l, r))
            down = shape.name.endswith("down")
            x = _random(m, 2 * shape.k if down else shape.k)
            weight = _weight(shape)
            prologue = "silu_mul" if down else None
            x_q, x_scale = cuda.quantize_act(x, left, right, 1.0, prologue)
            quantizes += median_us([partial(cuda.quantize_act, x, left, right, 1.0, prologue)] * 4)
            linears += median_us([partial(cuda.w4a4_linear, x_q, x_scale, weight)] * 4)
        yield {"model": model.name, "m": m, "quantize_us": quantizes, "linears_us": linears, "share": quantizes / linears}
