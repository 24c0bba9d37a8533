"""`w4a4_linear` beside other engines' linear layers, on projections of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from benchmarks.ops.case import Case, Skipped
from benchmarks.ops.own import byte_unit
from benchmarks.ops.peers import Peer, activations, weight
from benchmarks.shapes import Linear
from benchmarks.timing import Contender
from quota.ops import native
from quota.ops.w4a4_linear import w4a4_linear_ref
from quota.ops.weights import PackedWeight
from quota.quant.affine import quantize_weight

OP = "w4a4_linear"
ALONE, WITH_INPUT = "quota", "quota+quantize"


class Ours:
    """Our layer on one instruction set: `alone` on codes, `with_input` quantizing its float input first (no
    transform)."""

    def __init__(self, shape: Linear, isa: str) -> None:
        self.shape, self.isa = shape, isa
        native.set_isa(isa)
        self.weight = PackedWeight(*quantize_weight(weight(shape)), shape.k)

    def feed(self, m: int) -> None:
        native.set_isa(self.isa)
        self.x = activations(self.shape, m)
        self.x_q, self.x_scale = native.quantize_act(self.x, None, None, 1.0)

    def alone(self) -> torch.Tensor:
        return native.w4a4_linear(self.x_q, self.x_scale, self.weight)

    def with_input(self) -> torch.Tensor:
        return native.w4a4_linear(*native.quantize_act(self.x, None, None, 1.0), self.weight)

    def wrong(self) -> str | None:
        """None when a sample of the result equals the reference bit for bit."""
        columns, rows = torch.randperm(self.shape.n)[:192], slice(0, 24)
        native.set_isa(self.isa)
        part = PackedWeight(self.weight.w_q[columns], self.weight.w_scale[columns], self.shape.k)
        expected = w4a4_linear_ref(self.x_q[rows], self.x_scale[rows], part)
        return None if torch.equal(self.alone()[rows][:, columns], expected) else "differs from the reference"

    def contenders(self, m: int) -> list[Contender]:
        k, n = self.shape.k, self.shape.n
        moved = n * k / 2 + 4 * n + 4 * m * n
        common: dict[str, Any] = {
            "unit": byte_unit(self.isa),
            "isa": self.isa,
            "before": lambda: native.set_isa(self.isa),
        }
        return [
            Contender(ALONE, moved=moved + m * k / 2, run=self.alone, **common),
            Contender(WITH_INPUT, moved=moved + 4 * m * k, run=self.with_input, **common),
        ]


def cases(
    shapes: Sequence[Linear], rows: Sequence[int], peers: Sequence[Peer], isas: Sequence[str], threads: int
) -> Iterator[Case]:
    """Cases shape by shape: weights are prepared once per shape. A peer that fails or answers wrongly is left out and
    named."""
    for shape in shapes:
        yield from Prepared(OP, partial(Ours, shape), shape, peers, isas, threads).cases(rows)


class Own(Protocol):
    """An implementation of ours of one shape on one instruction set."""

    isa: str

    def feed(self, m: int) -> None:
        """Take M rows."""

    def wrong(self) -> str | None:
        """None when a sample of the result equals the reference bit for bit."""

    def contenders(self, m: int) -> list[Contender]:
        """What is timed; the first is compared with peers that take codes, the last with those that take floats."""


class Prepared:
    """Everything that is kept between the row counts of one shape; made when the first case is really measured. own:
    instruction set -> ours."""

    def __init__(
        self,
        op: str,
        own: Callable[[str], Own],
        shape: Linear,
        peers: Sequence[Peer],
        isas: Sequence[str],
        threads: int,
    ) -> None:
        self.op, self.own, self.shape, self.peers, self.isas, self.threads = op, own, shape, peers, isas, threads
        self.ours: list[Own] | None = None
        self.against = {"codes": "", "floats": ""}
        self.skipped: dict[str, str] = {}

    def cases(self, rows: Sequence[int]) -> Iterator[Case]:
        """One per row count, a single row also with cold caches; peers are closed after the last."""
        size = {"k": self.shape.k, "n": self.shape.n}
        for m in rows:
            for cold in (False, True) if m == 1 else (False,):
                yield Case(
                    self.op,
                    self.shape.name,
                    {"m": m, **size},
                    2.0 * m * self.shape.k * self.shape.n,
                    cold,
                    partial(self.contenders, m),
                )
        for peer in self.peers:
            peer.close()

    def contenders(self, m: int) -> tuple[list[Contender], list[Skipped]]:
        if self.ours is None:
            self.ours = [self.own(isa) for isa in self.isas]
            for peer in self.peers:
                self._try(peer, partial(peer.prepare, self.shape, self.threads))
        ready: list[Contender] = []
        for own in self.ours:
            own.feed(m)
            reason = own.wrong()
            if reason:
                raise AssertionError(f"{self.op} {own.isa} {self.shape.name} M={m}: {reason}")
            made = own.contenders(m)
            self.against = {"codes": made[0].name, "floats": made[-1].name}
            ready += made
        ready += [c for peer in self.peers if peer.name not in self.skipped and (c := self._contender(peer, m))]
        return ready, [Skipped(self.op, self.shape.name, name, reason) for name, reason in self.skipped.items()]

    def _contender(self, peer: Peer, m: int) -> Contender | None:
        wrong = self._try(peer, partial(peer.check, m))
        if wrong or peer.name in self.skipped:
            self.skipped[peer.name] = wrong or self.skipped[peer.name]
            return None
        size = 1 if peer.takes == "codes" else 4
        moved = peer.weight_bytes + m * self.shape.k * size + 4 * m * self.shape.n
        return Contender(peer.name, peer.unit, moved, against=self.against[peer.takes], sampler=peer.sample)

    def _try(self, peer: Peer, step: Any) -> str | None:
        """A peer's failure is the peer's: it is reported and left out."""
        try:
            return step()
        except Exception as error:
            self.skipped[peer.name] = (
                f"failed: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
            )
            return None
