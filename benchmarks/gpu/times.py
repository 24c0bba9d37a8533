"""Times on the device beside other libraries: graphs of calls between events, inputs rotated past the second-level
cache, medians."""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.checks import kv_of
from benchmarks.gpu.peers import cublaslt_runs, humming_runs
from benchmarks.shapes import MODELS, Attention, Decoder, Linear
from quota import ops
from quota.ops import cuda, triton
from quota.ops.float_linear import FloatWeight
from quota.ops.kv4_attention import Kv
from quota.ops.w4a4_linear import PackedWeight
from quota.ops.w4a16_linear import GroupedWeight
from quota.ops.weights import Factor
from quota.quant.affine import quantize_weight
from quota.quant.grouped import round_groups
from quota.quant.pack import pack_uint4
from quota.quant.transform import decompose, hadamard

ROWS = (1, 4, 16, 64, 173, 640, 2048)
FEW_ROWS = (1, 16, 640)
CONTEXTS = ((8, 16384), (1, 700))  # batch, slots
MORE_CONTEXTS = ((8, 4096), (16, 16384))
PAGE = 16  # slots, as the engine's default
LARGE = (1 << 30, 8192)  # bytes copied, rows of square matrices
CEILINGS = ("copy", "second-level cache", "bf16 8192^3", "int8 8192^3", "launch in a graph")
FULL = tuple(m for m in MODELS if m.name in ("llava-1.5-7b", "qwen2.5-vl-7b"))
DEVICE = "cuda"
Run = Callable[[], object]


def median_us(runs: Sequence[Run], repeats: int = 20, captured: bool = True) -> float:
    """Median microseconds per call of `runs`, the same call on different buffers, captured as one graph and replayed,
    or called anew each time."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs:  # loads modules and asks for shared memory outside the capture
            run()
    torch.cuda.synchronize()

    def again() -> None:
        for run in runs:
            run()

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again()
    samples = []
    for i in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay() if captured else again()
        end.record()
        end.synchronize()
        if i >= 3:
            samples.append(1e3 * begin.elapsed_time(end) / len(runs))
    return statistics.median(samples)


def copies(bytes_each: int) -> int:
    """How many sets of inputs are three times the second-level cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, -(-3 * cache // max(1, bytes_each))))


def timed(name: str, runs: Sequence[Run] | Callable[[], Sequence[Run]], captured: bool = True) -> dict[str, Any]:
    """A peer that fails, or whose calls cannot be made, is reported, and the others go on."""
    try:
        return {"implementation": name, "us": median_us(runs() if callable(runs) else runs, captured=captured)}
    except Exception as error:
        torch.cuda.synchronize()
        return {
            "implementation": name,
            "failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
        }


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def _weight(shape: Linear) -> PackedWeight:
    return PackedWeight(*quantize_weight(_random(shape.n, shape.k)), shape.k)


def _grouped(shape: Linear) -> GroupedWeight:
    q, scale, zero = round_groups(_random(shape.n, shape.k))
    return GroupedWeight(pack_uint4(q), scale, zero, shape.k)


def ceiling_rows() -> Iterator[dict[str, Any]]:
    """One row per ceiling, with what its time comes to: GB/s, or TFLOP/s."""

    def row(name: str, run: Run, amount: float, unit: str) -> dict[str, Any]:
        found = timed(name, [run]) | {"case": "ceiling"}
        return found | {"note": f"{amount / found['us']:.4g} {unit}"} if "us" in found else found

    source = torch.empty(LARGE[0], dtype=torch.uint8, device=DEVICE)
    yield row(CEILINGS[0], partial(torch.empty_like(source).copy_, source), 2 * source.numel() / 1e3, "GB/s")
    del source
    near = torch.ones(4 << 20, dtype=torch.float32, device=DEVICE).expand(
        64, -1
    )  # 16 MiB, read 64 times: no processor's own cache holds its part
    yield row(CEILINGS[1], partial(near.sum, 1), 4 * near.numel() / 1e3, "GB/s")
    size = LARGE[1]
    half = [_random(size, size, dtype=torch.bfloat16) for _ in range(2)]
    yield row(CEILINGS[2], partial(torch.nn.functional.linear, *half), 2 * size**3 / 1e6, "TFLOP/s")
    whole = [torch.randint(-8, 8, (size, size), device=DEVICE, dtype=torch.int8) for _ in range(2)]
    yield row(CEILINGS[3], partial(torch._int_mm, whole[0], whole[1].t()), 2 * size**3 / 1e6, "TOP/s")
    one = torch.zeros(32, device=DEVICE)
    yield timed(CEILINGS[4], [lambda: one.add_(1.0)] * 100) | {"case": "ceiling"}


def _factors(k: int) -> tuple[Factor, Factor]:
    """The Kronecker factors a checkpoint has for k features."""
    left, right = (Factor(hadamard(n).float().to(DEVICE)) for n in decompose(k))
    return left, right


def linear_rows(shape: Linear, m: int, peers: bool = True) -> Iterator[dict[str, Any]]:
    """w4a4_linear beside a bf16 product of the same size and, with `peers`, int8 and FP8 products and our Triton
    kernels."""
    n, k = shape.n, shape.k
    count = copies(n * k // 2)
    weights = [_weight(shape)]
    weights += [PackedWeight(weights[0].codes().clone(), weights[0].w_scale, k) for _ in range(count - 1)]
    x = _random(m, k)
    x_q, x_scale = cuda.quantize_act(x, None, None, 1.0)
    yield timed("quota", [partial(cuda.w4a4_linear, x_q, x_scale, w) for w in weights])

    factors = _factors(k)

    def with_input(w: PackedWeight) -> Tensor:
        return cuda.w4a4_linear(*cuda.quantize_act(x, *factors, 1.0), w)

    yield timed("quota+quantize", [partial(with_input, w) for w in weights])
    if peers:
        yield timed("quota-triton", [partial(triton.w4a4_linear, x_q, x_scale, w) for w in weights])
        grouped = [_grouped(shape)]
        grouped += [
            GroupedWeight(grouped[0].codes().clone(), grouped[0].w_scale, grouped[0].w_zero, k)
            for _ in range(count - 1)
        ]
        yield timed("quota-triton-w4a16", [partial(triton.w4a16_linear, x.half(), w) for w in grouped])
        del grouped
    del weights
    half, w_half = x.bfloat16(), [_random(n, k, dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]
    yield timed("cublas-bf16", [partial(torch.nn.functional.linear, half, w) for w in w_half]) | {
        "note": "bf16 out, ours float32"
    }
    del w_half
    if not peers:
        return
    x8 = torch.randint(-8, 8, (m, k), device=DEVICE, dtype=torch.int8)
    w8 = [torch.randint(-8, 8, (n, k), device=DEVICE, dtype=torch.int8) for _ in range(copies(n * k))]
    yield timed("cublaslt-int8", partial(cublaslt_runs, x8, w8)) | {
        "note": "32 MiB of workspace, the heuristic's first algorithm, int32 out"
    }
    rows = max(m, 17)  # torch._int_mm wants more than 16
    wide = torch.randint(-8, 8, (rows, k), device=DEVICE, dtype=torch.int8)
    yield timed("torch._int_mm", [partial(torch._int_mm, wide, w.t()) for w in w8]) | {
        "note": f"{rows} rows, no workspace, int32 out"
    }
    one = torch.ones((), device=DEVICE)
    x_fp8, w_fp8 = x.to(torch.float8_e4m3fn), [w.to(torch.float8_e4m3fn).t() for w in w8]
    yield timed("fp8", [partial(torch._scaled_mm, x_fp8, w, one, one, out_dtype=torch.bfloat16) for w in w_fp8])


def humming_rows(shape: Linear, m: int) -> Iterator[dict[str, Any]]:
    """w4a4_linear beside humming's W4A8; the first call of every size compiles."""
    weight, x = _weight(shape), _random(m, shape.k)
    x_q, x_scale = cuda.quantize_act(x, None, None, 1.0)
    weights = [
        PackedWeight(weight.codes().clone(), weight.w_scale, shape.k) for _ in range(copies(shape.n * shape.k // 2))
    ]
    yield timed("quota", [partial(cuda.w4a4_linear, x_q, x_scale, w) for w in weights])
    runs = functools.cache(
        lambda: humming_runs(x.bfloat16(), _random(shape.n, shape.k, dtype=torch.bfloat16), len(weights))
    )
    yield from (timed(name, partial(lambda of: runs()[of], name)) for name in ("humming-w4a8", "humming-w4a8+quantize"))


def attention_rows(shape: Attention, batch: int, slots: int) -> Iterator[dict[str, Any]]:
    """Decode: one query per row over `slots` slots, contiguous and in pages, beside attention on bf16 keys and
    values."""
    heads, kv_heads, d = shape.heads, shape.kv_heads, shape.head_dim
    q = _random(batch, heads, 1, d)
    one = [tuple(t.to(DEVICE) for t in kv_of(torch.randn(1, kv_heads, slots, d), slots)) for _ in range(2)]
    count = copies(batch * kv_heads * slots * (d + 16))
    caches: list[Any] = [[tuple(t.repeat(batch, *[1] * (t.ndim - 1)) for t in kv) for kv in one] for _ in range(count)]
    yield timed("quota", [partial(cuda.kv4_attention, q, c[0], c[1], slots, None, d**-0.5) for c in caches])
    width = -(-slots // PAGE)
    paged = [[_pages(kv, width) for kv in c] for c in caches]
    del caches
    table = torch.randperm(batch * width, device=DEVICE).view(batch, width).int()
    length = torch.full((batch,), slots, dtype=torch.int32, device=DEVICE)
    yield timed(
        "quota, paged", [partial(cuda.kv4_paged_attention, q, c[0], c[1], table, length, d**-0.5) for c in paged]
    )
    del paged
    half = q.bfloat16()
    floats = [
        [_random(batch, kv_heads, slots, d, dtype=torch.bfloat16) for _ in range(2)]
        for _ in range(copies(4 * batch * kv_heads * slots * d))
    ]
    yield timed("sdpa-bf16", [partial(_sdpa, False, half, *c) for c in floats])
    if importlib.util.find_spec("flash_attn") is None:
        yield {"implementation": "flash-attn", "failed": "flash-attn is not installed"}
        return
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found]

    turned = [[t.transpose(1, 2).contiguous() for t in c] for c in floats]
    yield timed("flash-attn", [partial(flash_attn_with_kvcache, half.transpose(1, 2), *c) for c in turned])


def _sdpa(causal: bool, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, is_causal=causal, enable_gqa=q.shape[1] != keys.shape[1]
    )


def _pages(kv: tuple[Tensor, ...], width: int) -> Kv:
    """A cache [B, Hkv, S, ..] as B * width pages of `PAGE` slots each; what is past S is zeros."""
    whole = [torch.nn.functional.pad(t, (0, 0) * (t.ndim - 3) + (0, width * PAGE - t.shape[2])) for t in kv]
    q, scale, zero = (t.unflatten(2, (width, PAGE)).transpose(1, 2).flatten(0, 1).contiguous() for t in whole)
    return q, scale, zero


_VOCABULARY = {"llava-1.5-7b": 32064, "qwen2.5-vl-7b": 152064}
_PROMPT = 640  # tokens, as in `python -m benchmarks model`; of them 64 are text


def layer_calls(model: Decoder, m: int) -> Iterator[tuple[str, str, Run]]:
    """(op, implementation, call) of all that the engine calls in a layer for m tokens, and at a model's end: ours as
    the registry chooses, then bf16's.

    Up to 16 tokens are rows that decode over 700 slots, more are one prompt.
    """
    d, heads, kv_heads, f = model.head_dim, model.heads, model.kv_heads, torch.nn.functional
    for shape in model.linears():
        down = shape.name.endswith("down")
        x, weight, prologue = _random(m, 2 * shape.k if down else shape.k), _weight(shape), "silu_mul" if down else None
        factors, name = _factors(shape.k), shape.name.rpartition(".")[2]
        yield f"quantize_act {name}", "quota", partial(ops.quantize_act, x, *factors, 1.0, prologue)
        yield (
            f"w4a4_linear {name}",
            "quota",
            partial(ops.w4a4_linear, *ops.quantize_act(x, *factors, 1.0, prologue), weight),
        )
        if not down:
            yield (
                f"w4a4_linear {name}",
                "cublas-bf16",
                partial(f.linear, x.bfloat16(), _random(shape.n, shape.k, dtype=torch.bfloat16)),
            )
    decodes = m <= 16
    batch, tokens, slots = (m, 1, 700) if decodes else (1, m, m)
    qkv, rotary = _random(1, m, (heads + 2 * kv_heads) * d), (_random(1, m, d), _random(1, m, d))
    k, v = (tuple(t.to(DEVICE) for t in kv_of(torch.randn(batch, kv_heads, slots, d), slots)) for _ in range(2))
    own = [tuple(t.to(DEVICE) for t in kv_of(torch.randn(1, kv_heads, m, d), m)) for _ in range(2)]
    matrix = Factor(hadamard(d).float().to(DEVICE))
    yield "qkv_append", "quota", partial(ops.qkv_append, qkv, rotary, (matrix, matrix), *own, 0, (1.0, 1.0))
    q = _random(batch, heads, tokens, d)
    half = [
        _random(batch, n, t, d, dtype=torch.bfloat16)
        for n, t in ((heads, tokens), (kv_heads, slots), (kv_heads, slots))
    ]
    if decodes:
        width = -(-slots // PAGE)
        table = torch.randperm(batch * width, device=DEVICE).view(batch, width).int()
        length = torch.full((batch,), slots, dtype=torch.int32, device=DEVICE)
        yield (
            "attention, paged",
            "quota",
            partial(ops.kv4_paged_attention, q, _pages(k, width), _pages(v, width), table, length, d**-0.5),
        )
        yield "attention, paged", "sdpa-bf16", partial(_sdpa, False, *half)
        yield (
            "kv4_page_write",
            "quota",
            partial(ops.kv4_page_write, _pages(k, width), own[0], torch.arange(m, device=DEVICE)),
        )
    else:
        yield "attention, prefill", "quota", partial(ops.kv4_attention, q, k, v, slots, None, d**-0.5)
        yield "attention, prefill", "sdpa-bf16", partial(_sdpa, True, *half)
    x, gain = _random(m, model.hidden), _random(model.hidden)
    yield "rms_norm", "quota", partial(ops.rms_norm, x, gain, 1e-5)
    yield "rms_norm", "torch-bf16", partial(f.rms_norm, x.bfloat16(), (model.hidden,), gain.bfloat16(), 1e-5)
    rows, head = (
        x[: min(m, 16)],
        FloatWeight(_random(_VOCABULARY.get(model.name, 64), model.hidden, dtype=torch.float16)),
    )
    yield f"float_linear M={len(rows)}", "quota", partial(ops.float_linear, rows, head)
    yield f"float_linear M={len(rows)}", "cublas-bf16", partial(f.linear, rows.bfloat16(), head.w.bfloat16())
    if m == _PROMPT:
        lse, place = _random(1, heads, m), torch.arange(m, device=DEVICE)[None]
        yield "token_score", "quota", partial(ops.token_score, q, k, lse, place >= 576, place < 576, d**-0.5)


def layer_rows(model: Decoder, m: int) -> Iterator[dict[str, Any]]:
    """A row per op and implementation. token_score reads on the host which tokens are pictures', so it is timed call by
    call."""
    for op, implementation, run in layer_calls(model, m):
        one = [run] if op == "token_score" else [run] * 4
        yield {"case": f"{model.name} M={m} {op}", "op": op, "model": model.name, "m": m} | timed(
            implementation, one, op != "token_score"
        )
