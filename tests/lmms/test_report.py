"""Scores taken apart, retention over strata, loyalty, the frontier, and `quota eval --tasks` from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from quota.cli.main import app
from quota.core.errors import UsageError
from quota.eval.generation import Cost
from quota.eval.statistics import resampled_retention, retention_by_task, total
from quota.lmms import run as lmms_run
from quota.lmms.__main__ import main
from quota.lmms.model import Quota
from quota.lmms.report import FLOAT, Configuration, EvalSettings, Outcome, compute_ratio, markdown, summarise_tasks
from quota.lmms.results import TaskReport
from quota.lmms.run import Plan
from quota.lmms.scores import Benchmark
from quota.report.pareto import frontier


def quota(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_strata_are_added_up_and_resampled_apart() -> None:
    """The spread of a sum of two means is that of the parts together, and the same questions are drawn for both
    rows."""
    rng = np.random.default_rng(0)
    full = {"a": rng.random(40) < 0.9, "b": rng.random(60) < 0.8}
    half = {name: values & (rng.random(len(values)) < 0.5) for name, values in full.items()}
    assert total(full) == pytest.approx(full["a"].mean() + full["b"].mean())
    drawn = resampled_retention({FLOAT: {"t": full}, "row": {"t": half}, "same": {"t": full}}, FLOAT, resamples=2000)
    assert np.all(drawn["same"] == 100)
    value = retention_by_task({"t": half}, {"t": full})["t"]
    assert value is not None and abs(drawn["row"].mean() - value) < 1
    alone = resampled_retention({FLOAT: {"t": full["b"]}, "row": {"t": half["b"]}}, FLOAT, resamples=2000)
    assert drawn["row"].std() < alone["row"].std()


def outcome(scores: dict[str, Any], texts: list[str], ratio: float) -> Outcome:
    records = [{"visual_tokens": 16, "visual_tokens_by_layer": [16, 8], "prompt_tokens": 20}] * 4
    benchmarks = {task: Benchmark("m", values, dict(enumerate(texts))) for task, values in scores.items()}
    return Outcome(
        benchmarks, Cost(10.0, 1.0, 1000.0, [16, 8]), records, ratio, 5000, {"peak_memory_bytes": None, "power_w": None}
    )


def test_report_compares_with_the_float_row(tmp_path: Path) -> None:
    rows = [Configuration(FLOAT, "f"), Configuration("q", "q"), Configuration("q+r", "q", Path("r.json"))]
    good, bad = np.array([1.0, 1, 1, 0]), np.array([1.0, 0, 0, 0])
    done = {
        FLOAT: outcome({"x": good, "mme": {"c": good * 200}}, ["a", "b", "c", "d"], 1.0),
        "q": outcome({"x": good, "mme": {"c": good * 200}}, ["a", "b", "c", "e"], 1.0),
        "q+r": outcome({"x": bad, "mme": {"c": good * 200}}, ["a", "x", "y", "z"], 0.5),
    }
    report = summarise_tasks(rows, done, EvalSettings(Plan(("x", "mme"), tmp_path), resamples=400))
    own = {row.name: row for row in report.rows}
    assert own["q"].retention is not None and own["q"].retention.value == 100
    assert own["q+r"].retention is not None and own["q+r"].retention.value == pytest.approx(
        (100 / 3 + 100) / 2, abs=1e-3
    )
    by_task = own["q+r"].retention_by_task
    assert (
        by_task["x"] is not None
        and by_task["x"].value == pytest.approx(100 / 3, abs=1e-3)
        and by_task["x"].low < by_task["x"].high
    )
    assert (
        own["q+r"].loyalty is not None
        and own["q+r"].loyalty.value == 25
        and own["q"].loyalty_by_task == {"x": 75, "mme": 75}
    )
    assert own["q+r"].scores == {"x": 0.25, "mme": 150} and report.questions == {"x": 4, "mme": 4}
    (compared,) = report.comparisons
    assert compared.row == "q+r" and compared.against == "q" and compared.difference.value < 0
    assert TaskReport.model_validate_json(report.model_dump_json()) == report
    text = markdown(report)
    assert "| q+r" in text and "No GPU was used" in text and "0.25 = 33.3 % (" in text and "m of x, mme" in text
    alone = summarise_tasks(rows[1:2], {"q": done["q"]}, EvalSettings(Plan(("x",), tmp_path), resamples=400))
    assert alone.rows[0].retention is None and alone.rows[0].loyalty is None


def test_compute_counts_the_tower_only_where_there_is_a_picture(llava_folder: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(llava_folder)
    full = {"visual_tokens": 16, "visual_tokens_by_layer": [16, 16, 16], "prompt_tokens": 30}
    text = {"visual_tokens": 0, "visual_tokens_by_layer": [0, 0, 0], "prompt_tokens": 30}
    pruned = {**full, "visual_tokens_by_layer": [16, 8, 4]}
    assert compute_ratio(config, [full, text]) == 1
    assert 0.5 < compute_ratio(config, [pruned]) < 1
    assert compute_ratio(config, [pruned, text]) == pytest.approx((compute_ratio(config, [pruned]) + 1) / 2)


def test_frontier_is_what_no_other_row_beats() -> None:
    assert frontier([(10, 90.0), (5, 80.0), (7, 70.0), (10, 85.0), (2, 80.0)]) == [4, 0]


def test_quota_eval_by_tasks(llava_folder: Path, tmp_path: Path) -> None:
    """Two rows of one checkpoint: the float model keeps all of itself. The second run answers nothing again."""
    out = tmp_path / "out"
    args = (
        "eval",
        llava_folder,
        "--model",
        llava_folder,
        "--tasks",
        "quota_scenes_choice,quota_scenes_relation",
        "--limit",
        "2",
        "--batch",
        "2",
        "--out",
        out,
    )
    result = quota(*args, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    report = TaskReport.model_validate_json((out / "eval.json").read_text())
    assert json.loads(result.stdout) == report.model_dump(mode="json")
    assert [row.name for row in report.rows] == ["float", llava_folder.name] and report.questions == {
        "quota_scenes_choice": 2,
        "quota_scenes_relation": 2,
    }
    assert all(row.loyalty is not None and row.loyalty.value == 100 and row.compute_ratio == 1 for row in report.rows)
    assert "retention" in (out / "eval.md").read_text()
    logs = {path: path.read_text() for path in (out / "answers").iterdir()}
    again = quota(*args)
    assert again.exit_code == 0 and "quota_scenes_relation" in again.stdout and "retention" in again.stdout
    assert logs == {path: path.read_text() for path in (out / "answers").iterdir()}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--tasks", ","), "--tasks: expected names"),
        (("--tasks", "a", "--samples", "s.json"), "--samples: not with --tasks"),
        (("--tasks", "a", "--blind"), "--blind: not with --tasks"),
        (("--tasks", "a", "--data", "nowhere"), "--data: no folder nowhere"),
        (("--tasks", "a", "--recipe", "none", "--recipe", "none"), "--recipe: none is given twice"),
        (("--limit", "3"), "--limit: only with --tasks"),
    ],
)
def test_wrong_use_is_one_line(llava_folder: Path, args: tuple[str, ...], words: str) -> None:
    result = quota("eval", llava_folder, *args)
    assert (
        result.exit_code == 1
        and result.stderr.startswith("error: ")
        and words in result.stderr
        and "Traceback" not in result.output
    )


def test_without_lmms_eval_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    with pytest.raises(UsageError, match=r"lmms-eval cannot be imported.*pip install --no-deps lmms-eval==0\.7\.3"):
        lmms_run.check_installed()


def test_lmms_eval_finds_the_model_by_its_entry_point() -> None:
    from lmms_eval.models import list_available_models

    assert "quota" in list_available_models(True)


@pytest.mark.slow
def test_the_command_itself_in_two_processes(llava_folder: Path, tmp_path: Path) -> None:
    """torchrun shares the questions out; each process logs its own, and one process afterwards finds them all
    answered."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "quota.lmms", *asked(llava_folder, tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logs = sorted((tmp_path / "answers").iterdir())
    assert [len(path.read_text().splitlines()) - 1 for path in logs] == [2, 1]
    assert list(tmp_path.glob("logs/**/*_samples_quota_scenes_choice.jsonl"))
    found = Quota(pretrained=str(llava_folder), answers=tmp_path / "answers")
    assert sorted(found.records()) == [("quota_scenes_choice", i) for i in range(3)]


@pytest.mark.parametrize("wrong", [("--tasks", "nothing_such"), ("--model_args", "pretrained=x,bits=4")])
def test_wrong_tasks_and_arguments_of_the_command_end_with_status_one(
    llava_folder: Path, tmp_path: Path, wrong: tuple[str, ...], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval import __main__ as command

    monkeypatch.setattr(command, "cli_evaluate_single", command.cli_evaluate_single)  # `main` replaces both
    monkeypatch.setattr(sys, "argv", [])
    # without reading two thousand tasks of others
    monkeypatch.setattr(command, "TaskManager", partial(command.TaskManager, include_defaults=False))
    with pytest.raises(SystemExit) as left:
        main([*asked(llava_folder, tmp_path), *wrong])
    assert left.value.code == 1 and "error: " in capsys.readouterr().err


def asked(model: Path, folder: Path) -> list[str]:
    """Arguments of `python -m quota.lmms`: three questions, answers and logs in `folder`."""
    return [
        *("--model_args", f"pretrained={model},answers={folder / 'answers'}"),
        *("--tasks", "quota_scenes_choice"),
        *("--limit", "3"),
        *("--device", "cpu"),
        *("--output_path", str(folder / "logs")),
        "--log_samples",
    ]
