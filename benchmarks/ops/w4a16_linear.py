"""`w4a16_linear` beside other float layers, with weights of four bits and whole ones, on projections of real models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.ops.case import Case
from benchmarks.ops.own import NAME, float_unit
from benchmarks.ops.peers import Peer, activations, weight
from benchmarks.ops.w4a4_linear import Prepared
from benchmarks.shapes import Linear
from benchmarks.timing import Contender
from quota.core.formats import INT4_GROUPS
from quota.ops import native
from quota.ops.w4a16_linear import w4a16_linear_ref
from quota.ops.weights import GroupedWeight
from quota.quant.grouped import round_groups
from quota.quant.pack import pack_uint4

OP = "w4a16_linear"
ALONE = ("openvino-i4-g128-f32", "ort-nbits-128-f32")  # peers of no other op
PEERS = (
    *ALONE,
    "ggml-q4_0",
    "torch-fp32",
    "torch-bf16",
)  # Q4_0 has no product that keeps activations whole: it rounds them to 8 bits here too


class Ours:
    """Our layer on one instruction set; symmetric groups, as the peers have them."""

    def __init__(self, shape: Linear, isa: str) -> None:
        self.shape, self.isa = shape, isa
        q, scale, zero = round_groups(weight(shape), replace(INT4_GROUPS, symmetric=True))
        self.weight = GroupedWeight(pack_uint4(q), scale, zero, shape.k)

    def feed(self, m: int) -> None:
        self.x = activations(self.shape, m)

    def run(self) -> torch.Tensor:
        return native.w4a16_linear(self.x, self.weight)

    def wrong(self) -> str | None:
        """None when a sample of the result equals the reference bit for bit."""
        columns, rows = torch.randperm(self.shape.n)[:64], slice(0, 6)
        native.set_isa(self.isa)
        w = self.weight
        part = GroupedWeight(w.w_q[columns], w.w_scale[columns], w.w_zero[columns], self.shape.k)
        return (
            None
            if torch.equal(self.run()[rows][:, columns], w4a16_linear_ref(self.x[rows], part))
            else "differs from the reference"
        )

    def contenders(self, m: int) -> list[Contender]:
        k, n = self.shape.k, self.shape.n
        moved = n * k / 2 + 8 * n * INT4_GROUPS.groups(k) + 4 * m * (k + n)
        return [
            Contender(
                NAME, float_unit(self.isa), moved, run=self.run, isa=self.isa, before=partial(native.set_isa, self.isa)
            )
        ]


def cases(
    shapes: Sequence[Linear], rows: Sequence[int], peers: Sequence[Peer], isas: Sequence[str], threads: int
) -> Iterator[Case]:
    """Cases shape by shape: weights are prepared once per shape."""
    for shape in shapes:
        yield from Prepared(OP, partial(Ours, shape), shape, peers, isas, threads).cases(rows)
