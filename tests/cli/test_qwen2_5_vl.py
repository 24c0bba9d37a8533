"""The second family through the very same commands: calibrate, recipe, run with pictures of any shape, eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from quota.cli.main import app
from quota.eval.questions import mixed_questions
from quota.scenes import assets
from quota.scenes import kinds as k
from tests.calib.calibration import qwen_folder


def quota(*args: Any) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, (args, result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qwen")
    qwen_folder(root / "float", key_bias=700)
    assets.write_calibration(root / "calibration", 5, family="qwen2_5_vl")
    samples = root / "calibration" / "samples.json"
    for path in (root / "calibration" / "images").iterdir():  # tiny pictures for the tiny model
        Image.open(path).resize((48, 32)).save(path)
    quota("calibrate", root / "float", "--samples", samples, "--out", root / "quantized", "--steps", "1")
    quota(
        "recipe",
        root / "quantized",
        "--model",
        root / "float",
        "--samples",
        samples,
        "--keep",
        "0.4",
        "--layers",
        "1-2",
        "--reference",
        "per_image",
        "--out",
        root / "recipe.json",
    )
    return root


def test_run_with_two_pictures_of_different_shapes(root: Path) -> None:
    for name, size in (("a", (80, 40)), ("b", (32, 32))):
        Image.new("RGB", size, (200, 90, 30)).save(root / f"{name}.png")
    pictures = ("--image", root / "a.png", "--image", root / "b.png")
    asked = (
        "--recipe",
        root / "recipe.json",
        *pictures,
        "-p",
        "what color is it ?",
        "--max-new-tokens",
        "3",
        "--show",
        root / "kept.png",
        "--json",
    )
    found = json.loads(quota("run", root / "quantized", *asked).stdout)
    assert found["visual_tokens"] == 50 + 16
    assert found["visual_tokens_by_layer"] == [66, found["visual_tokens_by_layer"][1], 20 + 7, 20 + 7]
    assert (root / "kept.png").stat().st_size > 1000
    assert (
        json.loads(
            quota("run", root / "quantized", "-p", "what is two plus two ?", "--max-new-tokens", "2", "--json").stdout
        )["visual_tokens"]
        == 0
    )


def test_eval_on_the_mixed_samples(root: Path) -> None:
    asked = ("--recipe", root / "recipe.json", "--samples", root / "calibration" / "samples.json", "--json")
    found = json.loads(quota("eval", root / "quantized", *asked).stdout)
    assert "pil" in json.dumps(found)


def test_mixed_questions_are_balanced_and_of_the_test_split() -> None:
    asked = mixed_questions(90)
    assert [q.id for q in asked[:45]] == [q.id for q in mixed_questions(45)] and len({q.id for q in asked}) == 90
    by_kind = {kind: [q for q in asked if q.task.startswith(f"{kind}/")] for kind in k.KINDS}
    assert {len(v) for v in by_kind.values()} == {18}
    assert {q.task for q in asked} == {f"{kind}/{task}" for kind in k.KINDS for task in k.TASKS[kind]}
    assert all((q.open_image is None) == (kind == k.TEXT) for kind, qs in by_kind.items() for q in qs)
    assert by_kind["chart"][0].open_image().size == k.PAGES["chart"].sizes[0]
