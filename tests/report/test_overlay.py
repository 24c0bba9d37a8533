"""The overlay: geometry of the model's view, of the kept patches, and the written file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from quota.core.errors import UsageError
from quota.report.overlay import dim_dropped, edges, model_view, save_overlay


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (max(2, height // 60), max(2, width // 60), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(400, 300), (300, 401), (336, 336), (90, 50)])
def test_the_view_is_the_processors_crop(size: tuple[int, int]) -> None:
    picture = noise(*size)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}, do_normalize=False, do_rescale=False
    )
    seen = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    view = np.asarray(model_view(picture, 112), dtype=np.float64)
    assert np.abs(view - seen).mean() < 4


def test_view_of_a_palette_picture() -> None:
    assert model_view(noise(40, 30).convert("P"), 56).mode == "RGB"


def test_kept_patches_are_untouched_and_dropped_ones_darker() -> None:
    view = noise(48, 48)
    kept = np.zeros((4, 4), dtype=bool)
    kept[1, 2] = True
    before, after = np.asarray(view).astype(int), np.asarray(dim_dropped(view, kept)).astype(int)
    assert (after[12:24, 24:36] == before[12:24, 24:36]).all()
    assert after[:12].mean() < before[:12].mean()
    assert np.array_equal(before, np.asarray(dim_dropped(view, np.ones((4, 4), dtype=bool))))


def test_edges_surround_exactly_the_kept_patches() -> None:
    kept = np.zeros((3, 3), dtype=bool)
    kept[1, 1:] = True
    found = {tuple(segment) for segment in edges(kept)}
    assert found == {((1, 1), (3, 1)), ((1, 2), (3, 2)), ((1, 1), (1, 2)), ((3, 1), (3, 2))}
    assert edges(np.zeros((3, 3), dtype=bool)) == []
    assert sum(abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in edges(np.ones((3, 3), dtype=bool))) == 12


def test_file_is_written_and_reproducible(tmp_path: Path) -> None:
    kept = {2: torch.rand(16, generator=torch.manual_seed(0)) > 0.4, 3: np.arange(16) < 5}
    for name in ("a.png", "b.png"):
        save_overlay(tmp_path / "sub" / name, noise(60, 50), kept)
    assert (tmp_path / "sub/a.png").read_bytes() == (tmp_path / "sub/b.png").read_bytes()
    with Image.open(tmp_path / "sub/a.png") as image:
        assert image.width > image.height > 100


def test_several_pictures_and_a_given_grid(tmp_path: Path) -> None:
    pictures = [noise(60, 50), noise(50, 60, 1)]
    save_overlay(tmp_path / "a.png", pictures, {layer: np.arange(32) % 3 == 0 for layer in range(1, 7)})
    save_overlay(tmp_path / "b.png", pictures[0], {1: np.ones(12, dtype=bool)}, grids=[(3, 4)])
    save_overlay(tmp_path / "c.png", pictures[:2], {1: np.arange(12 + 10) % 2 == 0}, grids=[(3, 4), (5, 2)])
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert a.height > 3 * b.height


@pytest.mark.parametrize(
    ("pictures", "kept", "message"),
    [
        (1, {2: 15}, "layer 2: expected a mask of 1 square grid, got 15"),
        (2, {2: 16}, "2 square grids"),
        (1, {}, "at least one"),
    ],
)
def test_errors(tmp_path: Path, pictures: int, kept: dict, message: str) -> None:
    masks = {layer: np.ones(n, dtype=bool) for layer, n in kept.items()}
    with pytest.raises(UsageError, match=message):
        save_overlay(tmp_path / "a.png", [noise(20, 20)] * pictures, masks)
    assert not (tmp_path / "a.png").exists()
