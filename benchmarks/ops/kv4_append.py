"""`kv4_append` beside copying the same tokens into a float cache and quantizing them with torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Skipped
from benchmarks.ops.own import NAME, float_contenders, require, seeded, torch_float_unit
from benchmarks.shapes import Attention
from benchmarks.timing import Contender
from quota.ops import native
from quota.ops.kv4_append import kv4_append_ref

OP = "kv4_append"
TOKENS = (1, 173, 640)
_OPERATIONS = 6  # per number: minimum, maximum, subtract, scale, round, pack


def cases(shapes: Sequence[Attention], isas: tuple[str, ...], *, quick: bool = False) -> Iterator[Case]:
    """Keys (or values) of one request, T tokens at once."""
    for shape in shapes:
        for tokens in TOKENS[: 1 if quick else None]:
            size = {"t": tokens, "hkv": shape.kv_heads, "d": shape.head_dim}
            operations = float(_OPERATIONS * tokens * shape.kv_heads * shape.head_dim)
            yield Case(OP, shape.name, size, operations, False, partial(_contenders, shape, tokens, isas))


def _contenders(shape: Attention, tokens: int, isas: tuple[str, ...]) -> tuple[list[Contender], list[Skipped]]:
    size = (1, shape.kv_heads, tokens)
    x = seeded(*size, shape.head_dim)

    def empty() -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(*size, shape.head_dim // 2, dtype=torch.uint8), torch.zeros(size), torch.zeros(size)

    expected, cache, copy = empty(), empty(), torch.zeros_like(x)
    kv4_append_ref(*expected, x, 0, 1.0)
    for isa in isas:
        native.set_isa(isa)
        native.kv4_append(*cache, x, 0, 1.0)
        require(all(torch.equal(got, want) for got, want in zip(cache, expected, strict=True)), f"{OP} ({isa})")
    moved = 4.5 * x.numel()
    return [
        *float_contenders(isas, moved, lambda: native.kv4_append(*cache, x, 0, 1.0)),
        Contender("torch", torch_float_unit(), moved, run=lambda: kv4_append_ref(*cache, x, 0, 1.0), against=NAME),
        Contender(
            "float32 copy",
            torch_float_unit(),
            8.0 * x.numel(),
            run=lambda: copy.copy_(x),
            against=NAME,
            note="no quantization",
        ),
    ], []
