"""One small world for the whole command line: a random LLaVA, its samples, its quantized checkpoint and a recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quota.cli.main import app
from quota.scenes import generate as g
from quota.scenes.model import build_config, build_model, build_processor


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


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    made = World(
        root, make_float(root / "float"), make_samples(root), root / "quantized", root / "recipe.json", root / "0.png"
    )
    for args in (
        ["calibrate", made.model, "--samples", made.samples, "--out", made.quantized, "--steps", "1", "--json"],
        [
            "recipe",
            made.quantized,
            "--model",
            made.model,
            "--samples",
            made.samples,
            "--keep",
            "0.3",
            "--layers",
            "1-2",
            "--out",
            made.recipe,
            "--json",
        ],
    ):
        result = CliRunner().invoke(app, [str(a) for a in args])
        assert result.exit_code == 0, (args, result.output, result.exception)
    return made
