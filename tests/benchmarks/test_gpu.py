"""`make gpu-check` without a GPU: everything that needs none runs, and a section that fails leaves the others alone."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu import apart, checks
from benchmarks.gpu import command as gpu
from benchmarks.gpu.options import ROOT, Line, Options, facts
from quota.core.files import OUTPUT_MARK
from quota.core.registry import Implementation
from quota.core.registry import ops as registered
from quota.ops import native
from quota.ops.w4a4_linear import w4a4_linear


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict]]:
    status = gpu.main(["--out", str(tmp_path), *arguments], "gpu")
    return status, json.loads((tmp_path / ("gpu-dry-run.json" if "--dry-run" in arguments else "gpu.json")).read_text())


def test_a_dry_run_plans_every_section_and_makes_every_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("machine", "build", "sass"):  # these look for programs that a CI machine need not have
        monkeypatch.setitem(gpu.SECTIONS, name, lambda options: iter([facts(skipped=True)]))
    status, records = run(tmp_path, "--dry-run", "--seed", "5")
    assert status == 0 and [r["section"] for r in records] == list(gpu.SECTIONS) and all(r["passed"] for r in records)
    by_name = {r["section"]: r for r in records}
    for section, implementation in (("ops", "cuda"), ("triton", "triton")):
        offered = [
            check
            for check in checks.all_checks(5, True)
            if implementation in [i.name for i in check.op.implementations]
        ]
        assert len(by_name[section]["rows"]) == len(offered) > 15
    assert {check.op.name for check in checks.all_checks(5, True)} == set(registered())  # no op without a check
    assert (
        "llava-1.5-7b.down M=640" in by_name["linears"]["would_time"]
        and "compute-sanitizer" in by_name["racecheck"]["would_run"]
    )
    assert (
        by_name["models"]["would_time"][1] == "llava-1.5-7b B=1: quota, keep 0.3"
        and len(by_name["models"]["would_time"]) == 10
    )
    assert all((r["seed"], len(r["digest"])) == (5, 12) and r["commit"] for r in records)
    assert "call 1: " in (said := capsys.readouterr().out) and "of 600" in said and "of 240" in said


def test_the_first_two_calls_fit_into_their_time() -> None:
    for call, seconds in gpu.SECONDS.items():
        assert 0.5 * seconds < sum(p.seconds for p in gpu.PLAN if p.call == call) <= seconds - 10
    for call in (1, 2, 3):
        assert gpu.plan([p.run.__name__ for p in gpu.PLAN if p.call == call]).startswith(f"call {call}: ")


def test_results_go_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "back"))
    assert gpu.main(["--dry-run", "--sections", "graph"], "gpu") == 0 and (tmp_path / "back/gpu-dry-run.md").exists()


def test_a_folder_of_the_users_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gpu-dry-run.md").write_text("mine")
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--sections", "graph", "--out", str(tmp_path)], "gpu")
    assert "--out: " in (said := capsys.readouterr().err) and "holds gpu-dry-run.md" in said
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-dry-run.md"] and (
        tmp_path / "gpu-dry-run.md"
    ).read_text() == "mine"
    assert (ROOT / "benchmarks" / "results" / OUTPUT_MARK).is_file()  # the folder it writes to unless told otherwise


def test_one_failing_section_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(options: Options) -> Iterator[Line]:
        """Breaks."""
        yield facts(begun=True)
        raise RuntimeError("no such program")

    monkeypatch.setitem(gpu.SECTIONS, "build", fails)
    status, records = run(tmp_path, "--dry-run", "--sections", "graph,build")
    assert status == 1 and [r["passed"] for r in records] == [False, True]
    report = (tmp_path / "gpu-dry-run.md").read_text()
    assert "| build | FAILED |" in report and "no such program" in report and "| graph | planned |" in report


WORKER = """
import json, subprocess, sys, time
row = {"case": "a", "implementation": "quota", "us": 2.0}
print(json.dumps({"facts": {"arch": "9.0"}}), json.dumps({"row": row}), "noise", sep="\\n", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(json.dumps({"facts": {"child": child.pid}}), flush=True)
print(json.dumps({"row": {"case": "cut"}})[:9], end="", flush=True)
END
"""


def worker(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Sections run this in place of themselves, in their own process."""
    code, popen = WORKER.replace("END", end), subprocess.Popen
    monkeypatch.setattr(
        apart.subprocess,
        "Popen",
        lambda command, **more: popen([sys.executable, "-c", code] if "--worker" in command else command, **more),
    )


def gone(pid: int) -> bool:
    """Killed: no longer there, or waiting for whoever inherits it to look. Signals take their time."""
    status, end = Path(f"/proc/{pid}/stat"), time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX":
                time.sleep(0.05)
                continue
        return True
    return False


@pytest.mark.parametrize(
    ("end", "said"), [("time.sleep(600)", "cut off after 20 s"), ("raise SystemExit(3)", "ended with 3"), ("", None)]
)
def test_a_cut_off_section_keeps_its_lines_and_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str, said: str | None
) -> None:
    worker(monkeypatch, end)
    status, (record,) = run(tmp_path, "--sections", "linears", "--limit-s", "20")
    assert (
        status == (1 if said else 0)
        and record["rows"] == [{"case": "a", "implementation": "quota", "us": 2.0}]
        and record["arch"] == "9.0"
    )
    assert "linears" in record["section"] and (
        record.get("failures", []) == [] if said is None else record["failures"][0].startswith(said)
    )
    assert gone(record["child"]) and '"row"' in (tmp_path / "gpu-linears.jsonl").read_text()


def test_what_does_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker(monkeypatch, "")
    status, records = run(tmp_path, "--sections", "linears,layer", "--budget-s", "3")
    assert status == 1 and all(r["failures"] == ["not begun: no time left"] for r in records)


def test_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check = next(c for c in checks.all_checks(1, True) if c.op is w4a4_linear)
    assert checks.run(check, "cpu", "ref") is None
    if native.why_not() is None:
        assert checks.run(check, "cpu", "ref", "native") is None
    right = w4a4_linear.implementations[-1].run
    wrong = Implementation("wrong", lambda *a: right(*a) + 1.0, lambda _: None)
    monkeypatch.setattr(w4a4_linear, "implementations", [wrong, *w4a4_linear.implementations])
    assert "values differ" in (checks.run(check, "cpu", "wrong") or "")


def test_unknown_sections_are_refused() -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--sections", "op"], "gpu")
