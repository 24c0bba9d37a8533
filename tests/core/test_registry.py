from collections.abc import Iterator

import pytest

from quota.core import registry
from quota.core.errors import UsageError
from quota.core.registry import Op, ops


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Op]:
    monkeypatch.setattr(registry.Op, "_table", {})
    monkeypatch.delenv("QUOTA_IMPL", raising=False)
    made = Op("add", lambda a, b: a + b)
    made.add("broken", lambda a, b: None, lambda: "it is broken")
    yield made


def test_unsupported_falls_through_to_the_reference(op: Op) -> None:
    assert op.choose().name == "ref" and op(1, 2) == 3 and ops() == {"add": op}


def test_later_registrations_come_first_and_the_choice_is_kept(op: Op) -> None:
    op.add("fast", lambda a, b: 10 * (a + b))
    assert op(1, 2) == 30 and op.choose() is op.choose()


def test_forcing(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    op.add("fast", lambda a, b: 0)
    monkeypatch.setenv("QUOTA_IMPL", "add=ref")
    assert op(1, 2) == 3
    for value, message in (("add=broken", "it is broken"), ("add=none", "expected one of"), ("sub=ref", "unknown op 'sub'")):
        monkeypatch.setenv("QUOTA_IMPL", value)
        op.rebind()
        with pytest.raises(UsageError, match=message):
            op(1, 2)
