"""A random model with its samples and questions, and one bench whose cache all tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quota.scenes import assets
from quota.study.bench import StudySettings
from tests.calib.calibration import qwen_folder
from tests.cli.conftest import make_float, make_samples


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> StudySettings:
    """Three decoder layers, 16 visual tokens; the same pictures serve as calibration samples and questions."""
    root: Path = tmp_path_factory.mktemp("study")
    model, samples = make_float(root / "float"), make_samples(root, 6)
    return StudySettings(
        out=root / "out",
        model=str(model),
        samples=samples,
        tasks="scenes",
        questions=24,
        steps=0,
        resamples=200,
        max_new_tokens=3,
        quiet=True,
    )


@pytest.fixture(scope="session")
def qwen_settings(tmp_path_factory: pytest.TempPathFactory) -> StudySettings:
    """The second family: three decoder layers, pictures of at most 64 visual tokens, the five kinds of questions."""
    root: Path = tmp_path_factory.mktemp("qwen-study")
    qwen_folder(root / "float", layers=3, key_bias=100)
    limit_images(root / "float", 64)
    samples = assets.write_calibration(root / "calibration", 5, family="qwen2_5_vl")
    return StudySettings(
        out=root / "out",
        model=str(root / "float"),
        samples=samples,
        questions=15,
        steps=0,
        resamples=200,
        max_new_tokens=3,
        quiet=True,
    )


def limit_images(checkpoint: Path, tokens: int) -> None:
    """Have the processor reduce pictures to at most `tokens` visual tokens (of 8 px)."""
    path = checkpoint / "processor_config.json"
    known = json.loads(path.read_text())
    known["image_processor"]["size"] = {"shortest_edge": 4 * 64, "longest_edge": tokens * 64}
    path.write_text(json.dumps(known))
