"""Charts of a study: retention per row, along the keep ratio, and against compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from quota.report.style import (
    BLUE,
    FAINT,
    INK,
    MUTED,
    ORANGE,
    TEAL,
    VIOLET,
    add_axes,
    heading,
    new_figure,
    save_figure,
    tidy,
)

_SERIES = (ORANGE, BLUE, TEAL, VIOLET)  # what is ours is orange


@dataclass(frozen=True)
class Point:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bar:
    name: str
    point: Point
    published: float | None = None


def save_bars(path: str | Path, title: str, note: str, bars: Sequence[Bar]) -> None:
    """Horizontal bars with intervals, one per row; a hollow mark where a published figure of the row exists."""
    height_in = 1.5 + 0.34 * len(bars)
    figure = new_figure(9, height_in)
    widest = max(len(bar.name) for bar in bars)
    left = min(0.45, 0.06 + 0.0078 * widest)
    axes = add_axes(figure, (left, 0.45 / height_in, 0.97 - left, 1 - 1.4 / height_in))
    for place, bar in enumerate(bars):
        axes.barh(place, bar.point.value, height=0.62, color=BLUE, zorder=2)
        axes.plot([bar.point.low, bar.point.high], [place, place], color=INK, linewidth=1.3, zorder=3)
        axes.text(
            max(bar.point.high, bar.published or 0) + 1.2,
            place,
            f"{bar.point.value:.1f}",
            va="center",
            fontsize=8.5,
            color=MUTED,
            zorder=4,
        )
        if bar.published is not None:
            axes.plot(
                bar.published, place, marker="D", markersize=6, markerfacecolor="none", markeredgecolor=ORANGE, zorder=5
            )
    tidy(axes, "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.9)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, max([105.0, *(bar.point.high + 8 for bar in bars)]))
    hollow = (
        "  ·  diamonds: published, other model and questions" if any(bar.published is not None for bar in bars) else ""
    )
    heading(figure, 0.03, title, note + hollow)
    save_figure(figure, path)


def save_curve(
    path: str | Path,
    title: str,
    note: str,
    own: Sequence[tuple[float, Point]],
    published: Sequence[tuple[float, float]],
) -> None:
    """Retention along the keep ratio in percent; the published curve dashed."""
    figure = new_figure(8, 4.6)
    axes = add_axes(figure, (0.08, 0.13, 0.88, 0.66))
    own = sorted(own, key=lambda pair: pair[0])
    x = [keep for keep, _ in own]
    axes.fill_between(
        x, [p.low for _, p in own], [p.high for _, p in own], color=ORANGE, alpha=0.16, linewidth=0, zorder=2
    )
    axes.plot(x, [p.value for _, p in own], color=ORANGE, linewidth=2, marker="o", markersize=5, zorder=3)
    if published:
        line = sorted(published)
        axes.plot(
            [k for k, _ in line],
            [v for _, v in line],
            color=MUTED,
            linewidth=1.3,
            linestyle=(0, (4, 3)),
            marker="D",
            markersize=4,
            zorder=2,
        )
    tidy(axes, "")
    axes.set_xlabel("visual tokens kept after the last drop, percent", fontsize=9, color=MUTED)
    heading(figure, 0.03, title, note + ("  ·  dashed: published, other model and questions" if published else ""))
    save_figure(figure, path)


def save_groups(path: str | Path, title: str, note: str, rows: Sequence[tuple[str, str, Point]]) -> None:
    """rows: (group, series, retention). One line per group in the order given, a mark with its interval per series; a
    series of one group has no key."""
    groups = list(dict.fromkeys(group for group, _, _ in rows))
    shared = [
        name
        for name in dict.fromkeys(series for _, series, _ in rows)
        if sum(series == name for _, series, _ in rows) > 1
    ]
    height_in = 1.75 + 0.52 * len(groups)
    figure = new_figure(9, height_in)
    axes = add_axes(figure, (0.17, 0.45 / height_in, 0.8, 1 - 1.75 / height_in))
    for group, series, point in rows:
        color = _SERIES[1 + shared.index(series)] if series in shared else ORANGE
        place = groups.index(group) + (0.22 * (shared.index(series) - (len(shared) - 1) / 2) if series in shared else 0)
        axes.plot([point.low, point.high], [place, place], color=color, linewidth=2, alpha=0.45, zorder=2)
        axes.plot(point.value, place, marker="o", markersize=5.5, color=color, zorder=3)
        axes.text(point.high + 0.6, place, f"{point.value:.1f}", va="center", fontsize=7.5, color=MUTED)
    tidy(axes, "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.9)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    lowest = min(point.low for _, _, point in rows)
    axes.set_xlim(max(0.0, 5 * (lowest // 5) - 5), max(105.0, *(point.high + 4 for _, _, point in rows)))
    heading(figure, 0.03, title, note)
    place = 0.03
    for number, name in enumerate(shared):
        figure.text(place, 1 - 1.0 / height_in, "●", fontsize=10, color=_SERIES[1 + number])
        figure.text(place + 0.02, 1 - 1.0 / height_in, name, fontsize=9, color=MUTED)
        place += 0.045 + 0.0095 * len(name)
    save_figure(figure, path)


def save_tradeoff(path: str | Path, title: str, note: str, rows: Sequence[tuple[str, str, float, Point]]) -> None:
    """rows: (name, series, compute in percent, retention). One panel per series on one scale; names without "(series)",
    best first."""
    series = list(dict.fromkeys(s for _, s, _, _ in rows))
    most = max(sum(s == name for _, s, _, _ in rows) for name in series)
    height_in = 1.6 + 0.3 * most
    lowest, highest = min(row[3].low for row in rows), max(row[3].high for row in rows)
    first = max(0.0, 10 * (lowest // 10) - 5)
    figure = new_figure(5.2 * len(series) + 0.4, height_in)
    for number, name in enumerate(series):
        own = sorted((row for row in rows if row[1] == name), key=lambda row: -row[3].value)
        left = (0.4 + 5.2 * number + 1.9) / (5.2 * len(series) + 0.4)
        axes = add_axes(figure, (left, 0.5 / height_in, 3.1 / (5.2 * len(series) + 0.4), 1 - 1.75 / height_in))
        _panel(axes, [(row[0].removesuffix(f" ({name})"), *row[2:]) for row in own], _SERIES[number % len(_SERIES)])
        tidy(axes, name)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=FAINT, linewidth=0.9)
        axes.set_xlim(
            first, first + (max(105.0, highest) - first) / 0.64
        )  # the rest is for the figures beside the marks
    heading(figure, 0.02, title, note + "  ·  right: compute of the whole model")
    save_figure(figure, path)


def _panel(axes: Axes, rows: Sequence[tuple[str, float, Point]], color: str) -> None:
    for place, (_, spent, point) in enumerate(rows):
        axes.plot([point.low, point.high], [place, place], color=color, linewidth=2, alpha=0.45, zorder=2)
        axes.plot(point.value, place, marker="o", markersize=6, color=color, zorder=3)
        axes.text(point.high + 1, place, f"{point.value:.1f}  at {spent:.0f} %", va="center", fontsize=8, color=MUTED)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
