from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from quota.core import registry
from quota.core.errors import UsageError
from quota.core.registry import Context, Op, ops


def add_ref(a, b):
    return a + b


def backend(name: str, run: Callable, supports: Callable[[Context], str | None] = lambda ctx: None) -> Any:
    return SimpleNamespace(__name__=f"package.{name}", add=run, supports=supports)


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Op]:
    monkeypatch.setattr(registry.Op, "_table", {})
    monkeypatch.delenv("QUOTA_IMPL", raising=False)
    yield Op(add_ref, backend("broken", lambda a, b: None, lambda ctx: "it is broken"))


def test_unsupported_falls_through_to_the_reference(op: Op) -> None:
    assert op.choose().name == "ref" and op(1, 2) == 3 and ops() == {"add": op}


def test_the_first_that_runs_is_taken_and_kept(op: Op) -> None:
    fast, faster = backend("fast", lambda a, b: 10 * (a + b)), backend("faster", lambda a, b: 0)
    op = Op(add_ref, backend("broken", print, lambda ctx: "it is broken"), fast, faster)
    assert [i.name for i in op.implementations] == ["broken", "fast", "faster", "ref"]
    assert op(1, 2) == 30 and op.choose().name == "fast"
    op.implementations.clear()
    assert op(1, 2) == 30


@dataclass(frozen=True)
class Device:
    type: str
    index: int | None


@dataclass
class Placed:
    device: Device


def test_each_device_has_its_own_choice(op: Op) -> None:
    gpu = backend(
        "gpu", lambda a, b: "gpu", lambda ctx: None if ctx.device == "cuda" else f"tensors are on {ctx.device}"
    )
    there, here = Placed(Device("cuda", 1)), Placed(Device("cpu", None))
    op = Op(
        add_ref, gpu, backend("host", lambda a, b: "host", lambda ctx: None if ctx == Context() else "not on the host")
    )
    assert op(there, 0) == "gpu" and op(here, 0) == "host" and op((there, 0), 0) == "gpu" and op(1, 2) == "host"
    assert op.choose(Context("cuda", 3)).name == "gpu"


def test_a_gpu_never_falls_to_the_reference_unasked(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Placed(Device("cuda", 1))
    with pytest.raises(
        UsageError, match=r"device: cuda:1 has no implementation of add \(broken: it is broken\).*QUOTA_IMPL=add=ref"
    ):
        op(there, 0)
    monkeypatch.setenv("QUOTA_IMPL", "add=ref")
    assert op.choose(Context("cuda", 1)).name == "ref"


def test_forcing(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    op = Op(add_ref, backend("fast", lambda a, b: 0), backend("broken", print, lambda ctx: "it is broken"))
    monkeypatch.setenv("QUOTA_IMPL", "add=ref")
    assert op(1, 2) == 3
    for value, message in (
        ("add=broken", "it is broken"),
        ("add=none", "expected one of"),
        ("sub=ref", "unknown op 'sub'"),
    ):
        monkeypatch.setenv("QUOTA_IMPL", value)
        op.rebind()
        with pytest.raises(UsageError, match=message):
            op(1, 2)
