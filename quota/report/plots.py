"""The layer profile (where to prune, and how much) and the recipe as a bar chart, as PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from quota.allocate.explain import compact_layers, facts, layer_rows
from quota.allocate.profile import Profile
from quota.core.errors import RecipeError
from quota.core.methods import METHODS
from quota.core.recipe import Recipe
from quota.report.style import (
    BAND,
    BLUE,
    MUTED,
    ORANGE,
    PEACH,
    RUST,
    TEAL,
    VIOLET,
    add_axes,
    heading,
    new_figure,
    save_figure,
    tidy,
)


def save_profile_plot(path: str | Path, profile: Profile, recipe: Recipe) -> None:
    """Four panels over the decoder layers: concentration with its interquartile range, redundancy, sensitivity, and the
    recipe's keep ratio.

    The candidate layers are shaded. RecipeError when the recipe is for a model of another depth.
    """
    layers = profile.model.layers
    if recipe.model.layers != layers:
        raise RecipeError(
            f"model.layers: the profile has {layers} decoder layers, the recipe {recipe.model.layers}; plot a recipe"
            " made from this profile"
        )
    figure = new_figure(11, 7.7)
    x = np.arange(layers)
    panels = [add_axes(figure, (left, bottom, 0.405, 0.265)) for bottom in (0.525, 0.085) for left in (0.07, 0.565)]
    _concentration(panels[0], x, profile)
    _redundancy(panels[1], x, profile)
    _sensitivity(panels[2], x, profile, recipe.candidates)
    _keep(panels[3], recipe)
    for axes in panels:
        _layer_axis(axes, layers, recipe.candidates)
    note = f"{profile.model.architecture}, {profile.samples} samples, {profile.model.visual_tokens} visual tokens"
    heading(
        figure,
        0.07,
        f"Layer profile, {profile.regime}",
        f"{note}  ·  shaded: layers {compact_layers(recipe.candidates)} drop tokens",
    )
    save_figure(figure, path)


def save_recipe_plot(path: str | Path, recipe: Recipe) -> None:
    """Bars of the visual tokens alive per decoder layer, with what each candidate layer drops stacked above in a
    lighter tone."""
    rows, total = layer_rows(recipe), recipe.reference_tokens
    layers = len(rows)
    width_in = max(7.5, min(13.0, 1.6 + 0.62 * layers))
    left = 0.7 / width_in
    figure = new_figure(width_in, 4.3)
    axes = add_axes(figure, (left, 0.14, 1 - left - 0.2 / width_in, 0.6))
    x = np.arange(layers)
    alive = np.array([row["tokens"] for row in rows])
    before = np.concatenate([[total], alive[:-1]])
    chosen = np.array([row["candidate"] for row in rows])
    axes.bar(x, alive, width=0.72, color=[ORANGE if c else BLUE for c in chosen], zorder=2)
    axes.bar(x[chosen], (before - alive)[chosen], bottom=alive[chosen], width=0.72, color=PEACH, zorder=2)
    small = layers > 16
    for i in range(layers):
        if i == 0 or alive[i] != before[i] or (i == layers - 1 and not small):
            size = 7 if small else 9.5
            axes.text(
                i,
                alive[i] - 0.018 * total,
                f"{alive[i]}",
                ha="center",
                va="top",
                fontsize=size,
                color="white",
                fontweight="bold",
                zorder=3,
            )
        if chosen[i] and alive[i] != before[i]:
            axes.text(
                i,
                before[i] + 0.015 * total,
                f"-{before[i] - alive[i]}",
                ha="center",
                va="bottom",
                fontsize=7 if small else 9,
                color=RUST,
                zorder=3,
            )
    f = facts(recipe)
    tidy(axes, "", "")
    axes.set_ylim(0, 1.1 * total)
    axes.set_ylabel("visual tokens alive", fontsize=9.5)
    _layer_axis(axes, layers, ())
    spent = (
        ""
        if f["compute_ratio_language"] is None
        else f"  ·  {f['compute_ratio_language']:.0%} of the language model's prefill compute"
    )
    name = METHODS[recipe.method].title if recipe.method in METHODS else "Custom"
    title = f"{name} recipe: {total} to {f['final_tokens']} visual tokens"
    heading(figure, left, title, f"{f['average_visual_tokens']:.0f} on average over {layers} layers{spent}")
    place = left
    for color, text in ((ORANGE, "layer that drops tokens"), (PEACH, "dropped at its input"), (BLUE, "other layers")):
        figure.text(place, 3.36 / 4.3, "■", fontsize=11, color=color)
        figure.text(place + 0.17 / width_in, 3.375 / 4.3, text, fontsize=9, color=MUTED)
        place += (0.42 + 0.068 * len(text)) / width_in
    save_figure(figure, path)


def _concentration(axes: Axes, x: np.ndarray, profile: Profile) -> None:
    tidy(axes, "Attention concentration", "share of the 10 strongest visual tokens; median and quartiles")
    axes.fill_between(
        x, profile.concentration_q25, profile.concentration_q75, color=BLUE, alpha=0.18, linewidth=0, zorder=2
    )
    axes.plot(x, profile.concentration_median, color=BLUE, linewidth=2, marker="o", markersize=4.5, zorder=3)
    _from_zero(axes, max(profile.concentration_q75))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _redundancy(axes: Axes, x: np.ndarray, profile: Profile) -> None:
    tidy(axes, "Redundancy", "median pairwise cosine similarity of the visual tokens")
    axes.plot(x, profile.redundancy_median, color=TEAL, linewidth=2, marker="o", markersize=4.5, zorder=3)
    low = min(0.0, *profile.redundancy_median)
    axes.set_ylim(1.1 * low, max(1.15 * max(profile.redundancy_median), 0.1))


def _sensitivity(axes: Axes, x: np.ndarray, profile: Profile, candidates: tuple[int, ...]) -> None:
    tidy(axes, "Quantization sensitivity", "relative error of the layer's input, median over samples")
    inside = [i in candidates or not candidates for i in range(len(x))]
    axes.bar(x, profile.sensitivity, width=0.66, color=[VIOLET if c else "#d5ccf1" for c in inside], zorder=2)
    _from_zero(axes, max(profile.sensitivity))
    if len(x) <= 16:
        for i, s in enumerate(profile.sensitivity):
            axes.text(i, s, f"{s:.3g}", ha="center", va="bottom", fontsize=7.8, color=MUTED, zorder=3)


def _keep(axes: Axes, recipe: Recipe) -> None:
    layers = recipe.model.layers
    tidy(
        axes,
        "Keep ratio",
        f"visual tokens alive inside the layer; {recipe.tokens_at(layers - 1)} of {recipe.reference_tokens} reach"
        " the end",
    )
    keep = [recipe.keep_at(i) for i in range(layers)]
    at = np.arange(layers + 1) - 0.5
    axes.stairs(keep, at, color=ORANGE, linewidth=2, zorder=3)
    axes.stairs(keep, at, fill=True, color=ORANGE, alpha=0.16, zorder=2)
    axes.axhline(recipe.final_keep, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
    labelled = recipe.candidates if layers <= 16 else recipe.candidates[-1:]
    for layer in labelled:
        place = (layer, "center") if layers <= 16 else (layer - 0.3, "left")
        label = f"{recipe.tokens_at(layer)}"
        axes.text(
            place[0],
            recipe.keep_at(layer) + 0.02,
            label,
            ha=place[1],
            va="bottom",
            fontsize=8.5,
            color=RUST,
            fontweight="bold",
            zorder=4,
        )
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
