"""A random model with its samples and questions, and one bench whose cache all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from quota.study.bench import StudySettings
from tests.cli.conftest import make_float, make_samples


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> StudySettings:
    """Three decoder layers, 16 visual tokens; the same pictures serve as calibration samples and questions."""
    root: Path = tmp_path_factory.mktemp("study")
    model, samples = make_float(root / "float"), make_samples(root, 6)
    return StudySettings(
        out=root / "out", model=str(model), samples=samples, tasks="scenes", questions=24, steps=0, resamples=200, max_new_tokens=3, quiet=True,
    )  # fmt: skip
