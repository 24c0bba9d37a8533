"""`make gpu-check` without a GPU: everything that needs none runs, and a section that fails leaves the others alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from quota.bench.gpu import __main__ as gpu
from quota.bench.gpu import checks
from quota.core.registry import Implementation
from quota.core.registry import ops as registered
from quota.ops.w4a4_linear import w4a4_linear


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> tuple[int, list[dict]]:
    monkeypatch.setattr(sys, "argv", ["gpu-check", "--out", str(tmp_path), *arguments])
    status = gpu.main()
    return status, json.loads((tmp_path / "gpu-dry-run.json").read_text())


def test_a_dry_run_plans_every_section_and_makes_every_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("machine", "build", "sass"):  # these look for programs that a CI machine need not have
        monkeypatch.setitem(gpu.SECTIONS, name, lambda options: {})
    monkeypatch.setattr(gpu, "markdown", lambda records: "")
    status, records = run(monkeypatch, tmp_path, "--dry-run", "--seed", "5")
    assert status == 0 and [r["section"] for r in records] == list(gpu.SECTIONS) and all(r["passed"] for r in records)
    by_name = {r["section"]: r for r in records}
    for section, implementation in (("ops", "cuda"), ("triton", "triton")):
        offered = [check for check in checks.all_checks(5, True) if implementation in [i.name for i in check.op.implementations]]
        assert by_name[section]["checks"] == len(offered) > 15
    assert {check.op.name for check in checks.all_checks(5, True)} == set(registered())  # no op without a check
    assert "llava-1.5-7b.down M=640" in by_name["linears"]["would_time"] and len(by_name["sanitizer"]["would_run"]) == 3
    assert by_name["models"]["would_time"][1] == "llava-1.5-7b B=1: quota, keep 0.3" and len(by_name["models"]["would_time"]) == 20


def test_one_failing_section_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(options: gpu.Options) -> dict:
        """Breaks."""
        raise RuntimeError("no such program")

    monkeypatch.setitem(gpu.SECTIONS, "build", fails)
    status, records = run(monkeypatch, tmp_path, "--dry-run", "--sections", "build,graph")
    assert status == 1 and [r["passed"] for r in records] == [False, True]
    report = (tmp_path / "gpu-dry-run.md").read_text()
    assert "| build | FAILED |" in report and "no such program" in report and "| graph | planned |" in report


def test_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check = next(c for c in checks.all_checks(1, True) if c.op is w4a4_linear)
    assert checks.run(check, "cpu", "ref") is None
    right = w4a4_linear.implementations[-1].run
    wrong = Implementation("wrong", lambda *a: right(*a) + 1.0, lambda ctx: None)
    monkeypatch.setattr(w4a4_linear, "implementations", [wrong, *w4a4_linear.implementations])
    assert "values differ" in (checks.run(check, "cpu", "wrong") or "")


def test_unknown_sections_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu-check", "--sections", "op"])
    with pytest.raises(SystemExit):
        gpu.main()
