"""The layer profile (where to prune, and how much) and the recipe as a bar chart, as PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from quota.allocate.explain import compact_layers, facts, layer_rows
from quota.allocate.profile import Profile
from quota.core.errors import RecipeError
from quota.core.recipe import Recipe
from quota.report.style import BAND, BLUE, INK, MUTED, ORANGE, TEAL, VIOLET, add_axes, new_figure, save_figure, tidy


def save_profile_plot(path: str | Path, profile: Profile, recipe: Recipe | None = None) -> None:
    """Four panels over the decoder layers: concentration with its interquartile range, redundancy, sensitivity, and the recipe's keep ratio.

    The candidate layers are shaded. Without a recipe the fourth panel is left out. RecipeError when the recipe is for another depth.
    """
    layers = profile.model.layers
    if recipe is not None and recipe.model.layers != layers:
        raise RecipeError(f"model.layers: the profile has {layers} decoder layers, the recipe {recipe.model.layers}; plot a recipe made from this profile")
    figure = new_figure(11, 7.4 if recipe else 4.3)
    grid = [(0.07, 0.57), (0.565, 0.57), (0.07, 0.085), (0.565, 0.085)] if recipe else [(0.055, 0.16), (0.385, 0.16), (0.715, 0.16)]
    width, height = (0.405, 0.29) if recipe else (0.265, 0.5)
    boxes = [add_axes(figure, (left, bottom, width, height)) for left, bottom in grid]
    candidates = recipe.candidates if recipe else ()
    x = np.arange(layers)

    _concentration(boxes[0], x, profile)
    _redundancy(boxes[1], x, profile)
    _sensitivity(boxes[2], x, profile, candidates)
    if recipe is not None:
        _keep(boxes[3], recipe)
    for axes in boxes:
        _layer_axis(axes, layers, candidates)
    shaded = f"  ·  shaded: layers {compact_layers(candidates)} drop tokens" if candidates else ""
    figure.text(grid[0][0], 0.955, f"Layer profile, {profile.regime}", fontsize=14, fontweight="bold", color=INK)
    figure.text(grid[0][0], 0.922 if recipe else 0.895, f"{profile.model.architecture}, {profile.samples} samples, {profile.model.visual_tokens} visual tokens{shaded}", fontsize=9.5, color=MUTED)
    save_figure(figure, path)


def save_recipe_plot(path: str | Path, recipe: Recipe) -> None:
    """Bars of the visual tokens alive per decoder layer, with what each candidate layer drops stacked above in a lighter tone."""
    rows, total = layer_rows(recipe), recipe.reference_tokens
    layers = len(rows)
    figure = new_figure(max(7.5, min(16, 1.6 + 0.62 * layers)), 4.3)
    axes = add_axes(figure, (0.09, 0.14, 0.88, 0.6))
    x = np.arange(layers)
    alive = np.array([row["tokens"] for row in rows])
    before = np.concatenate([[total], alive[:-1]])
    chosen = np.array([row["candidate"] for row in rows])
    axes.bar(x, alive, width=0.72, color=[ORANGE if c else BLUE for c in chosen], zorder=2)
    axes.bar(x[chosen], (before - alive)[chosen], bottom=alive[chosen], width=0.72, color="#fbe0cd", zorder=2)
    small = layers > 16
    for i in range(layers):
        if i == 0 or alive[i] != before[i] or (i == layers - 1 and not small):
            axes.text(i, alive[i] - 0.018 * total, f"{alive[i]}", ha="center", va="top", fontsize=7 if small else 9.5, color="white", fontweight="bold", zorder=3)
        if chosen[i] and alive[i] != before[i]:
            axes.text(i, before[i] + 0.015 * total, f"-{before[i] - alive[i]}", ha="center", va="bottom", fontsize=7 if small else 9, color="#b4531a", zorder=3)
    f = facts(recipe)
    tidy(axes, "", "")
    axes.set_ylim(0, 1.1 * total)
    axes.set_ylabel("visual tokens alive", fontsize=9.5)
    _layer_axis(axes, layers, ())
    spent = "" if f["compute_ratio_language"] is None else f"  ·  {f['compute_ratio_language']:.0%} of the language model's prefill compute"
    figure.text(0.09, 0.91, f"{'QUOTA' if recipe.method == 'quota' else 'Uniform'} recipe: {total} to {f['final_tokens']} visual tokens", fontsize=14, fontweight="bold", color=INK)
    figure.text(0.09, 0.845, f"{f['average_visual_tokens']:.0f} on average over {layers} layers{spent}", fontsize=9.5, color=MUTED)
    figure.text(0.09, 0.785, "■", fontsize=11, color=ORANGE)
    figure.text(0.115, 0.788, "layer that drops tokens", fontsize=9, color=MUTED)
    figure.text(0.37, 0.785, "■", fontsize=11, color="#fbe0cd")
    figure.text(0.395, 0.788, "dropped at its input", fontsize=9, color=MUTED)
    save_figure(figure, path)


def _concentration(axes: Axes, x: np.ndarray, profile: Profile) -> None:
    tidy(axes, "Attention concentration", "share of text-to-picture attention on its 10 strongest tokens; median and interquartile range")
    axes.fill_between(x, profile.concentration_q25, profile.concentration_q75, color=BLUE, alpha=0.18, linewidth=0, zorder=2)
    axes.plot(x, profile.concentration_median, color=BLUE, linewidth=2, marker="o", markersize=4.5, zorder=3)
    _from_zero(axes, max(profile.concentration_q75))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _redundancy(axes: Axes, x: np.ndarray, profile: Profile) -> None:
    tidy(axes, "Redundancy", "median pairwise cosine similarity of the visual tokens at the layer's input")
    axes.plot(x, profile.redundancy_median, color=TEAL, linewidth=2, marker="o", markersize=4.5, zorder=3)
    low = min(0.0, *profile.redundancy_median)
    axes.set_ylim(1.1 * low, max(1.15 * max(profile.redundancy_median), 0.1))


def _sensitivity(axes: Axes, x: np.ndarray, profile: Profile, candidates: tuple[int, ...]) -> None:
    tidy(axes, "Quantization sensitivity", "relative error of the layer's input under quantization, median over samples")
    inside = [i in candidates or not candidates for i in range(len(x))]
    axes.bar(x, profile.sensitivity, width=0.66, color=[VIOLET if c else "#d5ccf1" for c in inside], zorder=2)
    _from_zero(axes, max(profile.sensitivity))
    if len(x) <= 16:
        for i, s in enumerate(profile.sensitivity):
            axes.text(i, s, f"{s:.3g}", ha="center", va="bottom", fontsize=7.8, color=MUTED, zorder=3)


def _keep(axes: Axes, recipe: Recipe) -> None:
    layers = recipe.model.layers
    tidy(axes, "Keep ratio", f"visual tokens alive inside the layer; {recipe.tokens_at(layers - 1)} of {recipe.reference_tokens} reach the end")
    keep = [recipe.keep_at(i) for i in range(layers)]
    at = np.arange(layers + 1) - 0.5
    axes.stairs(keep, at, color=ORANGE, linewidth=2, zorder=3)
    axes.stairs(keep, at, fill=True, color=ORANGE, alpha=0.16, zorder=2)
    axes.axhline(recipe.final_keep, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
    if len(recipe.candidates) <= 10 and layers <= 40:
        size = 8.5 if layers <= 16 else 6.5
        for layer, ratio in zip(recipe.candidates, recipe.keep, strict=True):
            axes.text(layer, ratio + 0.02, f"{recipe.tokens_at(layer)}", ha="center", va="bottom", fontsize=size, color="#b4531a", fontweight="bold", zorder=4)
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _layer_axis(axes: Axes, layers: int, candidates: tuple[int, ...]) -> None:
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_xlabel("decoder layer", fontsize=9, color=MUTED, labelpad=3)
    if layers <= 20:
        axes.set_xticks(range(layers))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    for layer in candidates:
        axes.axvspan(layer - 0.5, layer + 0.5, color=BAND, linewidth=0, zorder=0)


def _from_zero(axes: Axes, top: float) -> None:
    axes.set_ylim(0, max(1.15 * top, 1e-6))
