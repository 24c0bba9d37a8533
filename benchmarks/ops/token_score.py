"""`token_score` at a candidate layer, beside the prefill of that layer and torch's attention matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Skipped
from benchmarks.ops.layer import DecoderLayer
from benchmarks.ops.own import NAME, float_contenders, relative_rms, require, torch_float_unit
from benchmarks.shapes import Attention
from benchmarks.timing import Contender
from quota.ops import native
from quota.ops.kv4_attention import dequantized
from quota.ops.token_score import token_score_ref

OP = "token_score"
LAYER = "the layer's prefill"
VISUAL, TEXT = 576, 64
_SYSTEM_TOKENS = 16  # text before the picture asks nothing of it
_TOLERANCE = 1e-5


def cases(shapes: Sequence[Attention], isas: tuple[str, ...]) -> Iterator[Case]:
    """One picture of 576 tokens in a prompt with 64 text tokens."""
    for shape in shapes:
        queries = TEXT - _SYSTEM_TOKENS
        pairs = VISUAL * (VISUAL + 1) / 2 + queries * VISUAL
        size = {
            "v": VISUAL,
            "t": queries,
            "s": VISUAL + TEXT,
            "h": shape.heads,
            "hkv": shape.kv_heads,
            "d": shape.head_dim,
        }
        yield Case(
            OP, shape.name, size, 2.0 * shape.heads * pairs * shape.head_dim, False, partial(_contenders, shape, isas)
        )


def _contenders(shape: Attention, isas: tuple[str, ...]) -> tuple[list[Contender], list[Skipped]]:
    slots = VISUAL + TEXT
    layer = DecoderLayer(shape, slots)
    native.set_isa(isas[0])
    q, k, lse = layer.q, layer.k, layer.attend()[1]  # packed keys, as a model scores them
    floats = dequantized(k, slots, shape.head_dim)
    slot = torch.arange(slots)[None]
    visual = (slot >= _SYSTEM_TOKENS) & (slot < _SYSTEM_TOKENS + VISUAL)
    text = slot >= _SYSTEM_TOKENS + VISUAL

    def run() -> tuple[Tensor, Tensor]:
        return native.token_score(q, k, lse, text, visual, layer.scaling)

    expected = token_score_ref(q, k, lse, text, visual, layer.scaling)
    for isa in isas:
        native.set_isa(isa)
        require(
            all(relative_rms(got, want) <= _TOLERANCE for got, want in zip(run(), expected, strict=True)),
            f"{OP} ({isa})",
        )
    moved = 4.0 * q.numel() + k[0].numel() + 8.0 * k[1].numel()
    return [
        *float_contenders(isas, moved, run),
        Contender(
            "torch, whole matrix",
            torch_float_unit(),
            moved,
            run=lambda: _whole_matrix(q, floats, text, visual, layer.scaling),
            against=NAME,
        ),
        Contender(
            LAYER,
            None,
            0.0,
            run=layer,
            against=NAME,
            before=lambda: native.set_isa(isas[0]),
            note=f"{isas[0]}, without norms and rotary embedding",
        ),
    ], []


def _whole_matrix(q: Tensor, k: Tensor, text: Tensor, visual: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """What `output_attentions=True` costs: softmax of all S x S scores, then two means."""
    heads, slots = q.shape[1], q.shape[2]
    score = q @ k.repeat_interleave(heads // k.shape[1], 1).transpose(-1, -2) * scaling
    a = score.masked_fill(torch.ones(slots, slots, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    return a[0, :, text[0]].mean((0, 1)) * visual, a[0, :, visual[0]].mean((0, 1)) * visual
