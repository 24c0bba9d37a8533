"""`quantize_act` with the Kronecker transform of each projection group, beside torch's products and the linear it
feeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Skipped
from benchmarks.ops.own import NAME, require, seeded, torch_float_unit
from benchmarks.ops.peers import weight
from benchmarks.shapes import Linear
from benchmarks.timing import Contender
from quota.ops import native
from quota.ops.quantize_act import quantize_act_ref
from quota.ops.weights import Factor, PackedWeight
from quota.quant.affine import quantize_symmetric, quantize_weight
from quota.quant.transform import decompose, hadamard

OP = "quantize_act"
FEEDS = "the linear it feeds"


def torch_quantize_act(x: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same in torch: two batched matrix products, then rounding (codes left unpacked)."""
    l, r = left.shape[0], right.shape[0]
    y = left.T @ x.view(-1, l, r) @ right
    return quantize_symmetric(y.view(x.shape), 1.0)


def cases(shapes: Sequence[Linear], rows: Sequence[int], isas: tuple[str, ...]) -> Iterator[Case]:
    """Groups with a Kronecker transform: all but output projections, whose transform only mixes heads."""
    for shape in shapes:
        if shape.name.endswith(".o"):
            continue
        l, r = decompose(shape.k)
        for m in rows:
            # a multiply-add per row of each factor
            yield Case(
                OP,
                shape.name,
                {"m": m, "l": l, "r": r},
                2.0 * m * shape.k * (l + r),
                False,
                partial(_contenders, shape, m, isas),
            )


def _contenders(shape: Linear, m: int, isas: tuple[str, ...]) -> tuple[list[Contender], list[Skipped]]:
    l, r = decompose(shape.k)
    left, right, x = hadamard(l).float(), hadamard(r).float(), seeded(m, shape.k)
    factors = Factor(left), Factor(right)

    def run() -> tuple[Tensor, Tensor]:
        return native.quantize_act(x, *factors, 1.0)

    sample = quantize_act_ref(x[:2], *factors, 1.0)
    for isa in isas:
        native.set_isa(isa)
        require(all(torch.equal(got[:2], want) for got, want in zip(run(), sample, strict=True)), f"{OP} ({isa})")
    packed, (x_q, x_scale) = PackedWeight(*quantize_weight(weight(shape)), shape.k), run()
    native.set_isa(isas[0])
    moved = 4.0 * m * shape.k + m * shape.k / 2
    return [
        # no probe of a ceiling multiplies pairs of int16
        *(Contender(NAME, None, moved, run=run, isa=isa, before=partial(native.set_isa, isa)) for isa in isas),
        Contender("torch", torch_float_unit(), moved, run=lambda: torch_quantize_act(x, left, right), against=NAME),
        Contender(
            FEEDS,
            None,
            0.0,
            run=lambda: native.w4a4_linear(x_q, x_scale, packed),
            against=NAME,
            before=lambda: native.set_isa(isas[0]),
            note=f"w4a4_linear, N={shape.n}, {isas[0]}",
        ),
    ], []
