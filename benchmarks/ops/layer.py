"""The prefill of one decoder layer in our ops, without norms and rotary embedding: the yardstick for what is added to a
layer."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.kv4_attention import cache_of
from benchmarks.ops.own import seeded
from benchmarks.ops.peers import weight
from benchmarks.shapes import MODELS, Attention
from quota.ops import native
from quota.ops.weights import Factor, PackedWeight
from quota.quant.affine import quantize_weight
from quota.quant.transform import decompose, hadamard


class DecoderLayer:
    """Four projection groups, each with its transform and quantization, and the attention, for one prompt of
    `tokens`."""

    def __init__(self, shape: Attention, tokens: int) -> None:
        linears = next(m for m in MODELS if m.name == shape.name).linears()
        self.inputs, self.weights, self.factors = [], [], []
        for linear in linears:
            left, right = (shape.heads, None) if linear.name.endswith(".o") else decompose(linear.k)
            self.factors.append(tuple(None if n is None else Factor(hadamard(n).float()) for n in (left, right)))
            self.inputs.append(seeded(tokens, linear.k))
            self.weights.append(PackedWeight(*quantize_weight(weight(linear)), linear.k))
        self.q, self.scaling = seeded(1, shape.heads, tokens, shape.head_dim), shape.head_dim**-0.5
        self.k, self.v, self.start = (
            cache_of(shape, tokens, 1),
            cache_of(shape, tokens, 2),
            torch.zeros(1, dtype=torch.int32),
        )

    def attend(self) -> tuple[Tensor, Tensor]:
        return native.kv4_attention(self.q, self.k, self.v, self.q.shape[2], self.start, self.scaling)

    def __call__(self) -> None:
        self.attend()
        for x, (left, right), w in zip(self.inputs, self.factors, self.weights, strict=True):
            native.w4a4_linear(*native.quantize_act(x, left, right, 1.0), w)
