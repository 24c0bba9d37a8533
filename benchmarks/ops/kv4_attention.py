"""`kv4_attention` over packed 4-bit keys and values, beside torch's attention over the same numbers as floats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.case import Case, Skipped
from benchmarks.ops.own import (
    NAME,
    float_contenders,
    relative_rms,
    require,
    seeded,
    torch_bfloat16_unit,
    torch_float_unit,
)
from benchmarks.ops.peers import verdict
from benchmarks.shapes import Attention
from benchmarks.timing import Contender
from quota.ops import native
from quota.ops.kv4_attention import dequantized, kv4_attention_ref
from quota.ops.weights import Kv

OP = "kv4_attention"
DECODE_SLOTS, PREFILL_TOKENS = (1024, 4096, 16384, 32768), (173, 640, 2048)
_TOLERANCE, _TORCH_TOLERANCE = 1e-5, {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def cache_of(shape: Attention, slots: int, seed: int) -> Kv:
    """A filled cache of one row: `slots` random tokens quantized by `kv4_append`."""
    size = (1, shape.kv_heads, slots)
    kv = torch.zeros(*size, shape.head_dim // 2, dtype=torch.uint8), torch.zeros(size), torch.zeros(size)
    native.kv4_append(*kv, seeded(*size, shape.head_dim, seed=seed), 0, 1.0)
    return kv


def cases(shapes: Sequence[Attention], isas: tuple[str, ...], *, quick: bool = False) -> Iterator[Case]:
    """One request: a token decoded over S cached ones, then whole prompts."""
    for shape in shapes:
        for tokens, slots in [(1, s) for s in DECODE_SLOTS[: 1 if quick else None]] + [
            (t, t) for t in PREFILL_TOKENS[: 1 if quick else None]
        ]:
            pairs = slots if tokens == 1 else tokens * (tokens + 1) / 2
            operations = 4.0 * shape.heads * pairs * shape.head_dim  # a product with the key, a product with the value
            size = {"t": tokens, "s": slots, "h": shape.heads, "hkv": shape.kv_heads, "d": shape.head_dim}
            yield Case(OP, shape.name, size, operations, False, partial(_contenders, shape, tokens, slots, isas))


def _contenders(
    shape: Attention, tokens: int, slots: int, isas: tuple[str, ...]
) -> tuple[list[Contender], list[Skipped]]:
    q, scaling = seeded(1, shape.heads, tokens, shape.head_dim), shape.head_dim**-0.5
    k, v, start = cache_of(shape, slots, 1), cache_of(shape, slots, 2), torch.zeros(1, dtype=torch.int32)

    def run() -> tuple[Tensor, Tensor]:
        return native.kv4_attention(q, k, v, slots, start, scaling)

    expected = kv4_attention_ref(q[:, :, -2:], k, v, slots, start, scaling)[0]  # the last queries see every slot
    for isa in isas:
        native.set_isa(isa)
        require(relative_rms(run()[0][:, -2:], expected) <= _TOLERANCE, f"{OP} ({isa})")
    values = 2 * shape.kv_heads * slots * shape.head_dim
    own = float_contenders(isas, values / 2 + 16 * shape.kv_heads * slots, run)
    found = [_torch(shape, q, k, v, slots, dtype, expected) for dtype in _TORCH_TOLERANCE]
    return own + [f for f in found if isinstance(f, Contender)], [f for f in found if isinstance(f, Skipped)]


def _torch(
    shape: Attention, q: Tensor, k: Kv, v: Kv, slots: int, dtype: torch.dtype, expected: Tensor
) -> Contender | Skipped:
    """`scaled_dot_product_attention` on dequantized keys and values; dequantizing is not timed."""
    keys, values = (dequantized(kv, slots, shape.head_dim).to(dtype) for kv in (k, v))
    queries, name = q.to(dtype), "sdpa-bf16" if dtype == torch.bfloat16 else "sdpa-fp32"

    def run() -> Tensor:
        return F.scaled_dot_product_attention(
            queries, keys, values, is_causal=q.shape[2] > 1, enable_gqa=shape.heads != shape.kv_heads
        )

    wrong = verdict(relative_rms(run().transpose(1, 2)[:, -2:].float(), expected), _TORCH_TOLERANCE[dtype])
    if wrong:
        return Skipped(OP, shape.name, name, wrong)
    unit = torch_bfloat16_unit() if dtype == torch.bfloat16 else torch_float_unit()
    return Contender(name, unit, 2.0 * keys.numel() * keys.element_size(), run=run, against=NAME)
