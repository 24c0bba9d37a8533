"""The same commands for every family: run with images of any shape, eval of samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quota.core.recipe import kept_tokens
from tests.cli.calls import quota
from tests.cli.conftest import World

# visual tokens of the images below, and the share that their recipes keep at the end
TOKENS = {
    "llava": {"photo": 16, "tall": 16, "dot": 16, "wide": 16, "square": 16},
    "qwen2_5_vl": {"photo": 240, "tall": 200, "dot": 4, "wide": 50, "square": 16},
}
KEEP = {"llava": 0.3, "qwen2_5_vl": 0.4}
LESS = {"llava": 4, "qwen2_5_vl": 2}  # at heads of 16 channels scales weigh as much as codes, and key biases add angles


@pytest.fixture(params=KEEP)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def world(worlds: Callable[[str], World], family: str) -> World:
    return worlds(family)


def test_run_takes_any_photo_several_and_none(world: World, family: str, tmp_path: Path) -> None:
    images = {
        "photo": Image.fromarray(np.random.default_rng(0).integers(0, 255, (97, 231, 3), dtype=np.uint8)),
        "tall": Image.new("RGBA", (31, 400), (10, 200, 30, 128)),
        "dot": Image.new("L", (1, 1), 7),
        "wide": Image.new("RGB", (80, 40), (200, 90, 30)),
        "square": Image.new("RGB", (32, 32), (200, 90, 30)),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    words = ("--max-new-tokens", "3", "--prompt", "Qu'est-ce que c'est? \N{SNOWMAN}")
    base = ("run", world.quantized, "--recipe", world.recipe, *words)

    def shown(names: tuple[str, ...]) -> list[object]:
        return [part for name in names for part in ("--image", tmp_path / f"{name}.png")]

    for names in (("photo",), ("tall",), ("dot",), ("photo", "tall"), ("wide", "square"), ()):
        result = quota(*base, *shown(names), "--json")
        assert result.exit_code == 0, (names, result.output, result.exception)
        found, counts = json.loads(result.stdout), [TOKENS[family][name] for name in names]
        assert found["visual_tokens"] == sum(counts), names
        if names:
            assert found["visual_tokens_by_layer"][0] == sum(counts)
            assert found["visual_tokens_by_layer"][-1] == sum(kept_tokens(KEEP[family], count) for count in counts)
    result = quota(*base, *shown(("wide", "square")), "--show", tmp_path / "kept.png")
    assert result.exit_code == 0, (result.output, result.exception)
    with Image.open(tmp_path / "kept.png") as overlay:
        assert overlay.width > 100


def test_eval_of_samples_with_a_float_row(world: World, family: str, tmp_path: Path) -> None:
    asked = ("--samples", world.samples, "--blind", "--out", tmp_path / "answers", "--json")
    args = ("eval", world.quantized, "--recipe", world.recipe, "--model", world.model, *asked)
    first = quota(*args)
    assert first.exit_code == 0, (first.output, first.exception)
    document = json.loads(first.stdout)
    plain, pruned = document["rows"]
    assert [plain["name"], pruned["name"]] == ["float", "quantized+recipe"]
    assert document["questions"] == len(json.loads(world.samples.read_text())["samples"])
    assert document["blind_accuracy_by_task"] is not None
    assert pruned["kv_dtype"] == "int4" and pruned["kv_bytes"] < plain["kv_bytes"] / LESS[family]
    assert pruned["average_visual_tokens"] < plain["average_visual_tokens"]
    assert "pil" in first.stdout
    again = json.loads(quota(*args).stdout)
    assert all(row["answer_seconds"] == 0 for row in again["rows"]), "finished answers are reused"
    assert [r["accuracy"] for r in again["rows"]] == [r["accuracy"] for r in document["rows"]]
