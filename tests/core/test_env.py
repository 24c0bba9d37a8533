import pytest

from quota.core.env import forced_cpu_isa, forced_implementations
from quota.core.errors import UsageError


def test_forced_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUOTA_IMPL", raising=False)
    assert forced_implementations() == {}
    monkeypatch.setenv("QUOTA_IMPL", "a=ref, b = native,")
    assert forced_implementations() == {"a": "ref", "b": "native"}


@pytest.mark.parametrize("text", ["a", "a=", "=ref", "a=ref,b"])
def test_malformed_entries_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("QUOTA_IMPL", text)
    with pytest.raises(UsageError, match="QUOTA_IMPL"):
        forced_implementations()


def test_forced_cpu_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUOTA_CPU_ISA", "")
    assert forced_cpu_isa() is None
    monkeypatch.setenv("QUOTA_CPU_ISA", "avx2")
    assert forced_cpu_isa() == "avx2"
    monkeypatch.setenv("QUOTA_CPU_ISA", "avx1024")
    with pytest.raises(UsageError, match="amx, avx512vnni, avxvnni, avx2, portable"):
        forced_cpu_isa()
