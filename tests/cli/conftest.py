"""Small worlds for the command line: a random model of a family, its samples, its quantized checkpoint and a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from quota.scenes import assets
from quota.scenes import generate as g
from quota.scenes.model import build_config, build_model, build_processor
from tests.calib.calibration import qwen_folder
from tests.cli.calls import quota


@dataclass(frozen=True)
class World:
    root: Path
    model: Path
    samples: Path
    quantized: Path
    recipe: Path
    picture: Path


def make_float(root: Path, seed: int = 0, layers: int = 3) -> Path:
    """A random checkpoint in float16: 16 visual tokens, width 64."""
    build_model(build_config(56, 64, layers), seed).half().save_pretrained(root)
    build_processor(56).save_pretrained(root)
    return root


def make_samples(root: Path, n: int = 3) -> Path:
    rows = []
    for i in range(n):
        s = g.scene("calibration", i, 168)
        g.draw(s).save(root / f"{i}.png")
        q = g.questions(s)[0]
        rows.append({"id": f"s{i}", "image": f"{i}.png", "instruction": q.text, "answer": q.answer, "task": q.task})
    path = root / "samples.json"
    path.write_text(json.dumps({"schema": "quota-samples/1", "samples": rows}))
    return path


def make_mixed_samples(root: Path) -> Path:
    """A sample of each kind, the images as tiny as the model."""
    assets.write_calibration(root, 5, family="qwen2_5_vl")
    for path in (root / "images").iterdir():
        Image.open(path).resize((48, 32)).save(path)
    return root / "samples.json"


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    """The world of a family, made when it is first asked for."""

    @cache
    def made(family: str) -> World:
        root = tmp_path_factory.mktemp(family)
        if family == "llava":
            model, samples, keep = make_float(root / "float"), make_samples(root), ("--keep", "0.3")
        else:
            model, samples = qwen_folder(root / "float", key_bias=700), make_mixed_samples(root / "samples")
            keep = ("--keep", "0.4", "--reference", "per_image")
        world = World(root, model, samples, root / "quantized", root / "recipe.json", root / "0.png")
        given = ("--samples", samples, "--json")
        for args in (
            ("calibrate", model, "--out", world.quantized, "--steps", "1", *given),
            ("recipe", world.quantized, "--model", model, "--layers", "1-2", "--out", world.recipe, *keep, *given),
        ):
            result = quota(*args)
            assert result.exit_code == 0, (args, result.output, result.exception)
        return world

    return made


@pytest.fixture(scope="session")
def world(worlds: Callable[[str], World]) -> World:
    return worlds("llava")
