"""Plots are written, reproducible, and refuse what does not belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from quota.allocate.recipe_builder import build_recipe
from quota.core.errors import RecipeError
from quota.report.plots import save_profile_plot, save_recipe_plot
from tests.allocate.profiles import profile


@pytest.mark.parametrize("layers", [3, 8, 32])
def test_profile_and_recipe_plots(tmp_path: Path, layers: int) -> None:
    p = profile(layers, jump=1)
    recipe = build_recipe(p, 0.3)
    for name in ("a", "b"):
        save_profile_plot(tmp_path / f"profile-{name}.png", p, recipe)
        save_recipe_plot(tmp_path / f"recipe-{name}.png", recipe)
    for kind in ("profile", "recipe"):
        assert (tmp_path / f"{kind}-a.png").read_bytes() == (tmp_path / f"{kind}-b.png").read_bytes()
        with Image.open(tmp_path / f"{kind}-a.png") as image:
            assert image.width >= 1000


def test_nothing_dropped_and_zero_figures(tmp_path: Path) -> None:
    names = ("sensitivity", "concentration_median", "concentration_q25", "concentration_q75")
    p = profile(redundancy_median=(-0.1,) * 8, **{name: (0.0,) * 8 for name in names})
    recipe = build_recipe(p, 1.0)
    save_profile_plot(tmp_path / "p.png", p, recipe)
    save_recipe_plot(tmp_path / "r.png", recipe)
    assert (tmp_path / "p.png").exists() and (tmp_path / "r.png").exists()


def test_another_depth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.layers: the profile has 8 decoder layers, the recipe 12"):
        save_profile_plot(tmp_path / "p.png", profile(8), build_recipe(profile(12), 0.3))
