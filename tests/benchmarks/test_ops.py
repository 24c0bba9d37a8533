"""Every op's case runs: ours passes its gate, rows carry ratios, a wrong peer is left out, a known case is not measured
again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.ops import (
    kv4_append,
    kv4_attention,
    peers,
    quantize_act,
    token_score,
    w4a4_linear,
    w4a16_linear,
)
from benchmarks.ops import run as run_ops
from benchmarks.ops.case import Case
from benchmarks.ops.peers import child
from benchmarks.ops.peers.torch_float import TorchFloat
from benchmarks.ops.peers.worker import ChildPeer
from quota.core.errors import UsageError
from quota.ops import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="the benchmark measures the native library")
SHAPE = next(s for s in shapes.LINEARS if s.name == "embedded.down")
SMALL = [a for a in shapes.ATTENTIONS if a.name == "embedded"]


@pytest.fixture(autouse=True)
def restored() -> None:
    yield  # type: ignore[misc]
    native.set_isa(None)


def isas() -> tuple[str, ...]:
    return native.supported_isas()[:2]


def first(cases: object) -> Case:
    return next(iter(cases))  # type: ignore[call-overload]


class Engine:
    """Another engine's layer whose arithmetic is ours: float64, times `factor`. What real ones compute on this CPU is
    the benchmark's business."""

    unit, tolerance = "fma256", 1e-5

    def __init__(self, takes: str, factor: float = 1.0) -> None:
        self.name, self.takes, self.factor = f"engine-{takes}", takes, factor

    def why_not(self) -> str | None:
        return None

    def prepare(self, shape: shapes.Linear, threads: int) -> None:
        self.w = peers.weight(shape).double()
        self.weight_bytes = self.w.numel()

    def feed(self, x: Tensor) -> None:
        self.x = x.double()

    def run(self) -> None:
        self.y = self.factor * (self.x @ self.w.T)

    def result(self) -> Tensor:
        return self.y.float()

    def expected(self, rows: slice, columns: slice) -> Tensor:
        return self.x[rows] @ self.w[columns].T


@pytest.fixture(autouse=True)
def exact_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's attention, a peer too, in float64."""
    real = kv4_attention.F.scaled_dot_product_attention
    exact = SimpleNamespace(
        scaled_dot_product_attention=lambda q, k, v, **how: real(q.double(), k.double(), v.double(), **how).float()
    )
    monkeypatch.setattr(kv4_attention, "F", exact)


CASES = {
    "quantize_act": lambda: quantize_act.cases([SHAPE], [3], isas()),
    "kv4_attention": lambda: kv4_attention.cases(SMALL, isas(), quick=True),
    "kv4_append": lambda: kv4_append.cases(SMALL, isas(), quick=True),
    "token_score": lambda: token_score.cases(SMALL, isas()),
    "w4a16_linear": lambda: w4a16_linear.cases([SHAPE], [3], [peers.Here(Engine("floats"))], isas(), 1),
    "w4a4_linear": lambda: w4a4_linear.cases(
        [SHAPE], [3], [peers.Here(Engine("codes")), peers.Here(Engine("floats"))], isas(), 1
    ),
}


@pytest.mark.parametrize("op", run_ops.OPS)
def test_a_case_prepares_checks_and_runs(op: str) -> None:
    case = first(CASES[op]())
    contenders, skipped = case.contenders()
    assert case.op == op and not skipped
    assert {c.isa for c in contenders if c.against is None} == set(isas())
    names = {c.name for c in contenders if c.against is None}
    assert all(c.against in names for c in contenders if c.against is not None) and len(contenders) > len(isas())
    for contender in contenders:
        assert contender.sample(1, cold=False).wall_ms > 0


@pytest.mark.parametrize("takes", ["codes", "floats"])
def test_a_wrong_peer_is_not_timed(takes: str) -> None:
    contenders, skipped = first(
        w4a4_linear.cases([SHAPE], [3], [peers.Here(Engine(takes, 1.1))], isas()[:1], 1)
    ).contenders()
    assert [c.name for c in contenders] == ["quota", "quota+quantize"]
    assert (
        skipped[0].peer == f"engine-{takes}"
        and skipped[0].reason == "peer is wrong on this CPU by 1.0e-01 (relative), allowed 1e-05"
    )


def test_attention_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kv4_attention.F.scaled_dot_product_attention
    monkeypatch.setattr(kv4_attention.F, "scaled_dot_product_attention", lambda *a, **how: 1.1 * right(*a, **how))
    contenders, skipped = first(CASES["kv4_attention"]()).contenders()
    assert {c.name for c in contenders} == {"quota"}
    assert [s.peer for s in skipped] == ["sdpa-fp32", "sdpa-bf16"] and all(
        "peer is wrong on this CPU by 1.0e-01" in s.reason for s in skipped
    )


def test_wrong_results_of_ours_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.w4a4_linear
    monkeypatch.setattr(native, "w4a4_linear", lambda *a: right(*a) + 1e-6)
    with pytest.raises(AssertionError, match="differs from the reference"):
        first(w4a4_linear.cases([SHAPE], [3], [], isas()[:1], 1)).contenders()


def test_a_child_takes_its_turn() -> None:
    apart = ChildPeer("torch-fp32-child", TorchFloat(torch.float32), {}, unit="fma256")
    try:
        apart.prepare(SHAPE, 1)
        assert apart.weight_bytes == 4 * SHAPE.k * SHAPE.n
        assert apart.check(2) is None
        assert apart.sample(2, False).wall_ms > 0
    finally:
        apart.close()


def test_a_child_never_starts_another() -> None:
    """Seen: the child of a peer that only exists as a child started one itself, and so on."""
    assert not any(isinstance(child.served(name).layer, ChildPeer) for name in peers.every_peer())


def test_every_peer_says_how_to_get_it() -> None:
    for peer in (make() for make in peers.every_peer().values()):
        reason = peer.why_not()
        assert reason is None or "install" in reason or "this CPU" in reason


def test_rows_are_kept_and_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_ops, "ceilings", lambda threads: None)
    monkeypatch.setattr(run_ops, "every_peer", lambda: {"engine-floats": lambda: peers.Here(Engine("floats"))})
    out = tmp_path / "ops.jsonl"
    selection = run_ops.Selection(
        ops=("w4a4_linear",), shapes=(SHAPE.name,), rows=(2,), peers=("engine-floats",), isas=isas()[:1], quick=True
    )
    measured = list(run_ops.run(selection, out))
    assert [m.reused for m in measured] == [False]
    own = next(r for r in measured[0].rows if r["implementation"] == "quota+quantize")
    assert len(own["ratios"]["engine-floats"]) == 3 and own["size"] == {"m": 2, "k": SHAPE.k, "n": SHAPE.n}
    again = list(run_ops.run(selection, out))
    assert [m.reused for m in again] == [True] and again[0].rows == measured[0].rows


def test_choices_are_checked() -> None:
    with pytest.raises(UsageError, match="--peers"):
        run_ops.chosen_peers(["nobody"])
    with pytest.raises(UsageError, match="--shape"):
        shapes.chosen_linears(["gpt-5"])
    with pytest.raises(UsageError, match="--op"):
        list(run_ops.run(run_ops.Selection(ops=("conv",)), None))
