"""One way through the commands for every family that shows an image in tiles: calibrate, recipe, run, eval, serve."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from quota.core.recipe import kept_tokens
from quota.models import find_family
from quota.prune.budget import tile_sizes
from quota.runtime.load import load
from quota.server.config import Settings
from quota.server.service import Service
from tests.calib.calibration import tiled_folder
from tests.cli.calls import quota
from tests.cli.conftest import make_samples
from tests.serve.asking import ask
from tests.serve.conftest import Host
from tests.serve.pictures import noise, user
from tests.tiny import TILED

QUESTION = "what color is the star ?"


def call(*args: object) -> str:
    result = quota(*args)
    assert result.exit_code == 0, (args, result.output, result.exception)
    return str(result.stdout)


@pytest.mark.parametrize("family", TILED)
def test_from_a_float_folder_to_a_served_answer(family: str, tmp_path: Path) -> None:
    model, made, recipe = tiled_folder(tmp_path / "float", family), tmp_path / "made", tmp_path / "recipe.json"
    samples = make_samples(tmp_path, 2)
    for path in tmp_path.glob("*.png"):
        Image.open(path).resize((40, 30)).save(path)
    call("calibrate", model, "--samples", samples, "--steps", "1", "--out", made)
    budget = ("--keep", "0.3", "--reference", "per_tile", "--layers", "1-2")
    call("recipe", made, "--model", model, "--samples", samples, "--out", recipe, *budget)

    noise(90, 60).save(tmp_path / "wide.png")
    asked = ("--prompt", QUESTION, "--image", tmp_path / "wide.png", "--max-new-tokens", "8")
    found = json.loads(call("run", made, "--recipe", recipe, *asked, "--show", tmp_path / "kept.png", "--json"))
    opened = load(made)
    processor = opened.processor
    inputs = processor(text=[processor.image_token], images=[noise(90, 60)], return_tensors="pt")
    index = find_family(opened).image_index(inputs["input_ids"], [i.grid for i in find_family(opened).images(inputs)])
    (tiles,) = tile_sizes(index)[0]
    assert len(tiles) > 1 and found["visual_tokens"] == sum(tiles) == found["visual_tokens_by_layer"][0]
    assert found["visual_tokens_by_layer"][-1] == sum(kept_tokens(0.3, n) for n in tiles)
    with Image.open(tmp_path / "kept.png") as overlay:
        assert overlay.height > 100 * len(tiles)

    (row,) = json.loads(call("eval", made, "--recipe", recipe, "--samples", samples, "--json"))["rows"]
    assert row["visual_tokens_by_layer"][0] > row["average_visual_tokens"] > row["visual_tokens_by_layer"][-1] > 0

    settings = Settings(
        checkpoint="tiny", recipes=(f"pruned={recipe}",), kv_bytes=8 << 20, page_tokens=4, step_s=math.inf
    )
    host = Host(Service(opened, settings))
    try:
        answer = ask(host.running, user(QUESTION, noise(90, 60)))
    finally:
        host.stop()
    assert answer.choices[0].message.content.strip() == found["text"]
