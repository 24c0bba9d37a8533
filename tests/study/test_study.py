"""Studies on a tiny random model: every row on the same questions, resumable, published figures apart."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from quota.cli.main import app
from quota.cli.study import NAMES
from quota.core.errors import UsageError
from quota.core.recipe import Recipe
from quota.eval import answering, benchmark
from quota.eval.pipeline import Entry
from quota.runtime.load import Placement
from quota.study import run as study
from quota.study.bench import Bench, StudySettings
from quota.study.results import StudyReport
from quota.study.run import _where
from quota.study.runtime import _figures, measure
from quota.study.tables import KEEPS, ORDERS, Plan


@pytest.fixture(autouse=True)
def lenient_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is never right: a hash of what it says decides, so that rows differ and retention is defined."""
    for module in (answering, benchmark):
        monkeypatch.setattr(
            module, "is_right", lambda prediction, answer: zlib.crc32(f"{prediction} {answer}".encode()) % 2 == 0
        )


def finished(name: str, settings: StudySettings) -> StudyReport:
    report = study.run_study(name, settings)
    on_disk = StudyReport.model_validate_json((settings.out / f"{name}.json").read_text())
    assert on_disk == report
    assert (settings.out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    return report


def test_keep(settings: StudySettings) -> None:
    report = finished("keep", settings)
    assert [row.name for row in report.rows] == ["float", "keep 100 %", *(f"keep {100 * k:g} %" for k in KEEPS)]
    assert (
        report.rows[0].retention.value == 100
        and report.questions == 24
        and sum(report.questions_by_task.values()) == 24
    )
    assert [row.final_visual_tokens for row in report.rows] == [16, 16, 8, 7, 5, 4, 2, 1]
    ratios = [row.compute_ratio for row in report.rows[1:]]
    assert ratios[0] == 1 and ratios == sorted(ratios, reverse=True)
    text = (settings.out / "keep.md").read_text()
    table, published = text.split("Published figures")
    assert "95.65" in published and "95.65" not in table and "24 questions" in table
    for row in report.rows[2:]:
        assert row.recipe and Recipe.load(settings.out / row.recipe).method == "quota"


def test_pipelines_share_checkpoints_and_answers_with_keep(
    settings: StudySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished("keep", settings)
    report = finished("pipelines", settings)
    names = [row.name for row in report.rows]
    assert names[:6] == [
        "float",
        "quant-only",
        "prune-only",
        "quantize-then-prune",
        "prune-then-quantize",
        "collaborative",
    ]
    for method in ("pyramiddrop", "vtw", "divprune", "cdpruner", "random", "grid", "fitprune"):
        assert [name for name in names if name.startswith(f"{method}, ")] == [f"{method}, {order}" for order in ORDERS]
    pairs = {(c.row, c.against) for c in report.comparisons}
    assert {
        ("collaborative", "prune-only"),
        ("collaborative", "grid, prune-then-quantize"),
        ("grid, prune-only", "random, prune-only"),
    } <= pairs
    said = [note for note in report.notes if "better than random: " in note]
    assert [note.split(":")[0] for note in said] == list(ORDERS) and all(
        "divprune (" in note and "quota" not in note for note in said
    )
    weights = {row.name: row.weights for row in report.rows}
    assert weights["grid, prune-only"] == "float" and weights["grid, prune-then-quantize"].endswith(
        "calibrated on the pruned graph"
    )
    for how in ("_by_engine", "_by_generate"):
        monkeypatch.setattr(answering, how, lambda *_: pytest.fail("answered again"))
    monkeypatch.setattr("quota.calib.run.calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    assert study.run_study("pipelines", settings) == report


def test_modules(settings: StudySettings) -> None:
    report = finished("modules", settings)
    assert [row.name for row in report.rows] == ["float", "llm", "vision+llm", "vision+projector+llm"]
    assert all(row.compute_ratio == 1 and row.recipe is None for row in report.rows)


def test_compute_gives_every_method_the_same_budget(settings: StudySettings) -> None:
    report = finished("compute", settings)
    names = [row.name for row in report.rows]
    assert any(note.startswith("No row for fastv (float): compute: no recipe") for note in report.notes), (
        "two of three layers whole cost too much"
    )
    for method in (
        "quota",
        "quota, mmr",
        "quota, grid",
        "uniform",
        "pyramiddrop",
        "vtw",
        "divprune",
        "cdpruner",
        "random",
        "grid",
        "fitprune",
    ):
        assert f"{method} (float)" in names and f"{method} (w4a4kv4)" in names
    budget = next(row for row in report.rows if row.name == "quota (float)").gmacs
    for row in report.rows[2:]:
        if not row.name.startswith("vtw"):
            assert row.gmacs <= budget + 1e-9, row.name
    pairs = {(c.row, c.against) for c in report.comparisons}
    assert ("grid (w4a4kv4)", "random (w4a4kv4)") in pairs and ("quota (float)", "divprune (float)") in pairs


def test_weights_cover_leave_one_out_single_signals_and_the_sign(settings: StudySettings) -> None:
    report = finished("weights", settings)
    rows = {row.name: row for row in report.rows}
    assert {
        "without quant",
        "only inter",
        "45/25/10/-20 (quant reversed)",
        "only quant, reversed",
        "45/25/10/20 (default)",
        "35/25/10/30",
    } <= set(rows)
    plan = Recipe.load(settings.out / str(rows["without mag"].recipe))
    assert plan.weights.mag == 0 and abs(sum(plan.weights.model_dump().values()) - 1) < 1e-5
    assert Recipe.load(settings.out / str(rows["only quant, reversed"].recipe)).weights.quant == -1


def test_formats_put_weight_only_beside_w4a4kv4(settings: StudySettings) -> None:
    report = finished("formats", settings)
    names = ["w4a16 rtn", "w4a16 gptq", "w4a16 awq", "w4a4kv4"]
    assert [row.name for row in report.rows] == [
        "float",
        *(f"{name}{end}" for name in names for end in ("", " + quota")),
    ]
    assert [row.weights for row in report.rows[1::2]] == ["w4a16"] * 3 + ["w4a4kv4"]
    assert all((row.recipe is not None) == row.name.endswith("+ quota") for row in report.rows)
    pairs = {(c.row, c.against) for c in report.comparisons}
    assert {
        ("w4a16 gptq", "w4a16 rtn"),
        ("w4a16 awq + quota", "w4a16 awq"),
        ("w4a4kv4 + quota", "w4a16 gptq + quota"),
    } <= pairs


def test_runtime_measures_in_processes_of_their_own(settings: StudySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and disk per process; the reference of every op gives the native answers (a generated text depends on
    every bit)."""
    monkeypatch.setattr("quota.study.runtime.CHECKED", 1)
    report = finished("runtime", replace(settings, questions=6))
    for row in report.rows:
        assert row.figures["peak memory"].split()[1] in ("MB", "GB") and row.figures["disk"]
        assert row.figures["power"].endswith("W") or "not measured" in row.figures["power"]
        assert ("answers equal to the reference's" in row.figures) == (row.name != "float")
    assert report.rows[1].figures["answers equal to the reference's"] == "1 of 1"
    assert "peak memory" in (settings.out / "runtime.md").read_text()
    with pytest.raises(UsageError, match="the measuring process for 'broken' failed"):
        measure(Bench(settings), Entry("broken", str(settings.out), "float"), 1)


class Asked(Exception):
    """What a calibration is asked to run on."""


def test_a_study_elsewhere_makes_and_answers_its_rows_there(
    settings: StudySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*args: Any, settings: Any, **options: Any) -> None:
        raise Asked(settings.device, settings.dtype)

    half = Bench(replace(settings, place=Placement("cpu", "bfloat16")))
    entry = Entry("w4a4kv4", Bench(settings).quantized(), "w4a4kv4")
    monkeypatch.setattr("quota.calib.run.calibrate", asked)
    with pytest.raises(Asked) as found_on:
        half.quantized()
    assert found_on.value.args == ("cpu", "bfloat16")
    assert half.spec(entry).key != Bench(settings).spec(entry).key and " cpu bfloat16 " in half.spec(entry).key
    assert (
        half.loaded(entry.checkpoint, half.settings.place)[0].dtype == torch.bfloat16
        and half.loaded(entry.checkpoint)[0].dtype == torch.float32
    )
    found = measure(half, entry, 1)
    assert found["gpu"] is None and len(found["answers"]) == 1
    shown = _figures(entry, found | {"gpu": {"peak_bytes": 2_000_000, "power_w": 312.4, "power_why_not": None}})
    assert shown["GPU peak memory"] == "2.00 MB" and shown["GPU power"] == "312 W"
    assert (
        _where(half.settings) == ["Rows answered on cpu, with bfloat16 in what is not quantized."]
        and _where(settings) == []
    )


def test_profile_and_show(settings: StudySettings) -> None:
    layers = study.run_study("profile", settings)
    assert (
        len(layers["profile"]["sensitivity"]) == 3
        and (settings.out / "profile.png").exists()
        and "| layer |" in (settings.out / "profile.md").read_text()
    )
    shown = study.run_study("show", settings)
    assert (
        shown["methods"]["divprune"]["visual_tokens"] == {"0": 5}
        and (settings.out / shown["methods"]["divprune"]["overlay"]).exists()
    )


def test_a_samples_file_is_a_task(settings: StudySettings) -> None:
    report = finished("modules", replace(settings, tasks=str(settings.samples), questions=4))
    assert report.questions == 4
    with pytest.raises(UsageError, match="--tasks: expected 'scenes' or a samples file"):
        study.run_study("keep", replace(settings, tasks="gqa"))


def test_the_second_family(qwen_settings: StudySettings) -> None:
    """Five kinds as tasks, every picture's own budget, the merger as projector; text-only questions are asked in every
    row."""
    report = finished("modules", qwen_settings)
    assert [row.name for row in report.rows] == [
        "float",
        "llm",
        "vision+llm",
        "vision+projector+llm",
    ] and report.family == "qwen2_5_vl"
    assert report.questions_by_task == {"conversation": 3, "text": 3, "scene_text": 3, "document": 3, "chart": 3}
    report = finished("compute", qwen_settings)
    rows = {row.name: row for row in report.rows}
    assert Recipe.load(qwen_settings.out / str(rows["quota (w4a4kv4)"].recipe)).reference == "per_image"
    assert Recipe.load(qwen_settings.out / str(rows["divprune (float)"].recipe)).reference == "per_image"
    assert all(
        rows[f"{method} ({weights})"].compute_ratio < 1
        for method in ("quota", "grid", "vtw")
        for weights in ("float", "w4a4kv4")
    )
    shown = study.run_study("show", qwen_settings)
    assert shown["family"] == "qwen2_5_vl" and (qwen_settings.out / "show-grid.png").exists()


def test_a_family_is_of_the_embedded_models(settings: StudySettings, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--family: names an embedded model, and --model another one"):
        Bench(replace(settings, family="llava"))
    with pytest.raises(UsageError, match=r"--methods: expected some of fastv, .*got 'quota'"):
        Bench(replace(settings, methods=("random", "quota")))
    with pytest.raises(UsageError, match="--family: expected one of llava, qwen2_5_vl, got 'blip'"):
        Bench(StudySettings(out=tmp_path, family="blip"))


def test_errors(settings: StudySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(study.STUDIES) == NAMES
    with pytest.raises(UsageError, match=r"NAME: expected one of modules, .*got 'table9'"):
        study.run_study("table9", settings)
    bench = Bench(settings)
    plan = Plan("t", [Entry("float", bench.float_checkpoint, "float")])
    monkeypatch.setattr(bench, "answered", lambda entries: {"float": {"a": np.zeros(4, bool)}})
    with pytest.raises(UsageError, match="the float model answers no question correctly"):
        study.finish(bench, "modules", plan)


def test_command_line(settings: StudySettings, tmp_path: Path) -> None:
    def quota(*args: Any) -> Any:
        return CliRunner().invoke(app, [str(a) for a in args])

    common = (
        "--model",
        settings.model,
        "--samples",
        settings.samples,
        "--questions",
        24,
        "--steps",
        0,
        "--resamples",
        200,
        "--max-new-tokens",
        3,
        "--out",
        settings.out,
    )
    done = quota("study", "modules", *common, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["study"] == "modules"
    assert quota("study", "modules", *common).stdout.startswith("### Quantized modules")
    wrong = quota("study", "nothing", "--out", tmp_path / "o")
    assert wrong.exit_code == 1 and "NAME: expected one of modules" in wrong.stderr
    assert quota("study", "keep", "--model", tmp_path / "none", "--out", tmp_path / "o").exit_code == 1
