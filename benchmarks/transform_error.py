"""What transforming in integers changes: codes, distances from a tie and errors beside float64 and beside chains of
float32 multiply-adds.

`python -m benchmarks.transform_error [CHECKPOINT ...]`: rows of LLaVA-1.5-7B's sizes with outliers, and for every
quantized checkpoint named the activations that its linears quantize while it answers four questions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quota.ops.elementwise import apply_prologue
from quota.ops.fma import chain_matmul
from quota.quant.affine import symmetric_scale
from quota.quant.fixed import fixed_factor, fixed_kronecker, rounded_factor
from quota.quant.transform import apply_kronecker, decompose

_QUESTIONS, _ROWS = 2, 16  # questions asked of a checkpoint, and rows kept of each of its linears
_CHAIN_ROWS = 1  # of an input that go through the chains, which take long in this reference


@dataclass(frozen=True)
class Input:
    """Rows float32 [M, K] that a linear transforms and quantizes."""

    x: Tensor
    left: Tensor | None
    right: Tensor | None
    clip: float


@dataclass
class Difference:
    """Of one way to transform against float64: codes that differ, the farthest of them from a tie as a share of the
    row's largest input and of a step, and the RMS error in steps."""

    codes: int = 0
    differing: int = 0
    from_tie_of_input: float = 0.0
    from_tie_of_step: float = 0.0
    squares: float = 0.0

    def add(self, y: Tensor, exact: Tensor, x: Tensor, clip: float) -> None:
        scale = symmetric_scale(exact, clip).double()[:, None]
        found, want = (
            torch.round(v.double() / symmetric_scale(v, clip).double()[:, None]).clamp(-8, 7) for v in (y, exact)
        )
        steps = exact / scale
        from_tie = (steps - torch.floor(steps) - 0.5).abs()[found != want]
        relative = (scale / x.abs().amax(-1, keepdim=True).double()).expand_as(steps)[found != want]
        self.codes += found.numel()
        self.differing += len(from_tie)
        self.squares += float(((y - exact) / scale).square().sum())
        if len(from_tie):
            self.from_tie_of_step = max(self.from_tie_of_step, float(from_tie.max()))
            self.from_tie_of_input = max(self.from_tie_of_input, float((from_tie * relative).max()))

    def line(self, name: str) -> str:
        rms = (self.squares / self.codes) ** 0.5
        return (
            f"  {name:34} {self.differing / self.codes:9.2e} of {self.codes} codes; from a tie at most"
            f" {self.from_tie_of_step:.1e} steps, {self.from_tie_of_input:.1e} of max|x|; error {rms:.1e} steps RMS"
        )


def chain(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The transform in float32, as ascending chains of fused multiply-adds."""
    rows = left.shape[0] if left is not None else x.shape[1] // right.shape[0]  # type: ignore[union-attr]
    y = x.view(len(x), rows, -1)
    if left is not None:
        y = chain_matmul(left.T, y)
    return (y if right is None else chain_matmul(y, right)).reshape(x.shape)


def study(inputs: Iterator[Input]) -> list[str]:
    """One line for each way and what it is held against."""
    names = ("float32 chains", "integers, factors rounded before", "integers, factors rounded on load")
    found = {name: Difference() for name in names}
    for given in inputs:
        exact = _exact(given.x, given.left, given.right)
        fixed = [None if m is None else fixed_factor(m) for m in (given.left, given.right)]
        rounded = [None if m is None else rounded_factor(m) for m in (given.left, given.right)]
        y = fixed_kronecker(given.x, *fixed)
        first = given.x[:_CHAIN_ROWS]
        found[names[0]].add(chain(first, given.left, given.right), exact[:_CHAIN_ROWS], first, given.clip)
        found[names[1]].add(y, _exact(given.x, *rounded), given.x, given.clip)
        found[names[2]].add(y, exact, given.x, given.clip)
    return [difference.line(name) for name, difference in found.items()]


def _exact(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    return apply_kronecker(x.double(), *(None if m is None else m.double() for m in (left, right)))


def made(k: int, outlier: float, rows: int = 16) -> Iterator[Input]:
    """Normal rows of K values, three of them `outlier` standard deviations, and random orthogonal factors."""
    g = torch.Generator().manual_seed(k)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=g))[0] for n in decompose(k))
    x = torch.randn(rows, k, generator=g)
    if outlier:
        at = torch.randint(k, (rows, 3), generator=g)
        x.scatter_(1, at, outlier * torch.randn(rows, 3, generator=g).sign())
    yield Input(x, left.contiguous(), right.contiguous(), 0.9)


def recorded(checkpoint: Path) -> list[Input]:
    """What the transforming linears of a checkpoint get while it answers questions."""
    from quota.demo.embedded import held_out
    from quota.eval.generation import encode
    from quota.nn.linear import QuantLinear
    from quota.runtime.load import load_model

    model, processor = load_model(str(checkpoint))
    kept: list[Input] = []
    quantize = QuantLinear._quantize

    def recording(self: QuantLinear, rows: Tensor, prologue: str | None = None) -> tuple[Tensor, Tensor]:
        if (self.left is not None or self.right is not None) and len(rows) > 1:
            x = rows if prologue is None else apply_prologue(rows, prologue)
            every = max(1, len(x) // (_ROWS // _QUESTIONS))
            kept.append(Input(x[::every].clone(), self.left, self.right, float(self.clip)))
        return quantize(self, rows, prologue)

    patched: Any = QuantLinear
    patched._quantize = recording
    try:
        for question in held_out(_QUESTIONS, model.config):
            with torch.no_grad():
                model(**encode(model, processor, [question]))
    finally:
        patched._quantize = quantize
    return kept


def main(checkpoints: list[str]) -> None:
    for k in (4096, 11008):
        for outlier in (0.0, 30.0, 1000.0):
            print(f"K = {k}, three outliers of {outlier:g} standard deviations" if outlier else f"K = {k}, normal rows")
            print("\n".join(study(made(k, outlier))), flush=True)
    for checkpoint in checkpoints:
        inputs = recorded(Path(checkpoint))
        spread = [float((i.x.abs().amax(-1) / i.x.square().mean(-1).sqrt()).max()) for i in inputs]
        print(f"{checkpoint}: {len(inputs)} inputs of linears, max|x| up to {max(spread):.0f} times a row's RMS")
        print("\n".join(study(iter(inputs))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
