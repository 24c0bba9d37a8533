"""`quota demo` from start to end on a tiny random model of each family."""

from __future__ import annotations

from pathlib import Path

import pytest

from quota.core.errors import UsageError
from quota.demo.embedded import embedded, held_out, tour
from quota.demo.report import Report
from quota.demo.stages import DemoSettings, run_demo
from quota.scenes import assets
from quota.scenes import kinds as k
from tests.calib.calibration import qwen_folder
from tests.cli.conftest import make_float, make_samples
from tests.study.conftest import limit_images
from tests.tiny import tiny_llava, tiny_qwen
from tools.pages import demo as pages


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_all_stages(tmp_path: Path, family: str) -> None:
    if family == "llava":
        model, samples = make_float(tmp_path / "float"), make_samples(tmp_path, 4)
    else:
        model, samples = (
            qwen_folder(tmp_path / "float", layers=3),
            assets.write_calibration(tmp_path / "calibration", 5, family=family),
        )
        limit_images(model, 64)
    settings = DemoSettings(out=tmp_path / "out", model=str(model), samples=samples, questions=12, steps=0, quiet=True)
    report = run_demo(settings)
    assert Report.model_validate_json((tmp_path / "out" / "report.json").read_text()).model_dump(
        mode="json"
    ) == report.model_dump(mode="json")
    assert report.model.family == family and report.model.visual_tokens == (
        16 if family == "llava" else report.model.visual_tokens
    )
    kinds = (
        ["existence", "attribute", "position", "relation", "counting", "choice"] if family == "llava" else list(k.KINDS)
    )
    assert list(report.evaluation.questions_by_task) == kinds and report.evaluation.questions == 12
    assert [row.name for row in report.evaluation.rows][-2:] == ["collaborative", "quant-rtn"]
    assert {r["reference"] for r in report.recipes.values()} == {"recorded" if family == "llava" else "per_image"}
    drawn = {"overlay"} if family == "llava" else {"overlay", "overlay-scene_text", "overlay-document", "overlay-chart"}
    assert {name for name in report.files if name.startswith("overlay")} == drawn
    assert all((tmp_path / "out" / path).exists() for path in report.files.values())
    assert {a.image for a in report.answers} == {"image.png"} | (
        set() if family == "llava" else {None, "scene_text.png", "document.png", "chart.png"}
    )
    folder = pages.keep(tmp_path / "out", tmp_path / "kept")
    assert folder.name == family and {path.stem for path in folder.glob("overlay*.png")} == drawn
    text = pages.blocks(tmp_path / "kept")[pages.RESULTS][f"figures:{family}"]
    assert all(f"| {row.name} |" in text for row in report.evaluation.rows) and ("median image" in text) == (
        family != "llava"
    )


def test_the_model_decides_the_questions() -> None:
    assert {q.task for q in held_out(6, tiny_llava().config)} == {
        "existence",
        "attribute",
        "position",
        "relation",
        "counting",
        "choice",
    }
    asked = held_out(10, tiny_qwen().config)
    assert [q.task for q in asked] == 2 * list(k.KINDS) and [q.open_image is None for q in asked] == 2 * [
        False,
        True,
        False,
        False,
        False,
    ]
    assert list(tour(tiny_llava().config)) == ["image"] and list(tour(tiny_qwen().config)) == [
        "image",
        "text",
        "scene_text",
        "document",
        "chart",
    ]


def test_a_family_names_an_embedded_model(tmp_path: Path) -> None:
    assert embedded().family == "llava"
    with pytest.raises(UsageError, match="--family: expected one of llava, qwen2_5_vl, got 'blip'"):
        embedded("blip")
    with pytest.raises(UsageError, match="--family: names an embedded model, and --model another one"):
        run_demo(DemoSettings(out=tmp_path, family="llava", model="somewhere"))
