"""A row that the demo and a study share is one row: made once, with one figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quota.demo.stages import DemoSettings, run_demo
from quota.eval import answering
from quota.study import run as study
from quota.study.bench import StudySettings


def test_the_demos_rows_are_the_studys(
    settings: StudySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipelines after the demo, in its folder: nothing is calibrated or answered again, and figures are the same."""
    for module in ("answering", "benchmark"):  # a random model is never right
        monkeypatch.setattr(f"quota.eval.{module}.is_right", lambda said, answer: len(said) % 2 == 0)
    asked = replace(settings, out=tmp_path, questions=12, max_new_tokens=6, methods=())
    demo = DemoSettings(
        tmp_path, None, asked.keep, asked.questions, asked.model, asked.samples, asked.steps, quiet=True
    )
    shown = {row.name: row for row in run_demo(demo).evaluation.rows}
    for how in ("_by_engine", "_by_generate"):
        monkeypatch.setattr(answering, how, lambda *_: pytest.fail("answered again"))
    monkeypatch.setattr("quota.calib.run.calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    report = study.run_study("pipelines", asked)
    assert [row.name for row in report.rows] == [name for name in shown if name != "quant-rtn"]
    for row in report.rows:
        assert (row.accuracy, row.accuracy_by_task) == (shown[row.name].accuracy, shown[row.name].accuracy_by_task)
        assert shown[row.name].retention is not None and row.retention.value == shown[row.name].retention.value
