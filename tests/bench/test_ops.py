"""Every op's case runs: ours passes its gate, rows carry ratios, a wrong peer is left out, a known case is not measured again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quota.bench import kv4_append, kv4_attention, peers, quantize_act, run_ops, shapes, token_score, w4a4_linear, w4a16_linear
from quota.bench.case import Case
from quota.bench.peers import child
from quota.bench.peers.onednn import OneDnnInt8
from quota.bench.peers.torch_float import TorchFloat
from quota.bench.peers.worker import ChildPeer
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


CASES = {
    "quantize_act": lambda: quantize_act.cases([SHAPE], [3], isas()),
    "kv4_attention": lambda: kv4_attention.cases(SMALL, isas(), quick=True),
    "kv4_append": lambda: kv4_append.cases(SMALL, isas(), quick=True),
    "token_score": lambda: token_score.cases(SMALL, isas()),
    "w4a16_linear": lambda: w4a16_linear.cases([SHAPE], [3], [peers.Here(TorchFloat(torch.float32))], isas(), 1),
    "w4a4_linear": lambda: w4a4_linear.cases([SHAPE], [3], [peers.Here(OneDnnInt8()), peers.Here(TorchFloat(torch.float32))], isas(), 1),
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


class _Wrong(TorchFloat):
    def result(self) -> Tensor:
        return super().result() * 1.1


def test_a_wrong_peer_is_not_timed() -> None:
    contenders, skipped = first(w4a4_linear.cases([SHAPE], [3], [peers.Here(_Wrong(torch.float32))], isas()[:1], 1)).contenders()
    assert [c.name for c in contenders] == ["quota", "quota+quantize"]
    assert skipped[0].peer == "torch-fp32" and "relative error 1.0" in skipped[0].reason


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
    out = tmp_path / "ops.jsonl"
    selection = run_ops.Selection(ops=("w4a4_linear",), shapes=(SHAPE.name,), rows=(2,), peers=("torch-fp32",), isas=isas()[:1], quick=True)
    measured = list(run_ops.run(selection, out))
    assert [m.reused for m in measured] == [False]
    own = next(r for r in measured[0].rows if r["implementation"] == "quota+quantize")
    assert len(own["ratios"]["torch-fp32"]) == 3 and own["size"] == {"m": 2, "k": SHAPE.k, "n": SHAPE.n}
    again = list(run_ops.run(selection, out))
    assert [m.reused for m in again] == [True] and again[0].rows == measured[0].rows


def test_choices_are_checked() -> None:
    with pytest.raises(UsageError, match="--peers"):
        run_ops.chosen_peers(["nobody"])
    with pytest.raises(UsageError, match="--shape"):
        shapes.chosen_linears(["gpt-5"])
    with pytest.raises(UsageError, match="--op"):
        list(run_ops.run(run_ops.Selection(ops=("conv",)), None))


