"""Accuracy against what it costs, one panel per cost, and the rows that no other row beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quota.report.style import INK, MUTED, add_axes, heading, new_figure, save_figure, tidy


@dataclass(frozen=True)
class Mark:
    """One row. value: (estimate, low, high) of its accuracy; costs: axis label -> cost, less is better."""

    name: str
    value: tuple[float, float, float] | None
    costs: dict[str, float]


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the (cost, value) pairs that no other pair beats in one and equals or beats in the other, cheapest
    first."""
    best: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not best or points[place][1] > points[best[-1]][1]:
            best.append(place)
    return best


def save_pareto(path: str | Path, title: str, note: str, marks: Sequence[Mark], color: str) -> None:
    """PNG. Every mark needs a value and the same costs."""
    axes_names = list(marks[0].costs)
    width_in, height_in = 4.2 * len(axes_names), 4.4
    figure = new_figure(width_in, height_in)
    values = [mark.value for mark in marks if mark.value is not None]
    bottom, top = min(low for _, low, _ in values), max(high for _, _, high in values)
    for number, name in enumerate(axes_names):
        axes = add_axes(figure, ((4.2 * number + 0.55) / width_in, 0.14, 3.35 / width_in, 0.64))
        points = [(mark.costs[name], value[0]) for mark, value in zip(marks, values, strict=True)]
        line = [points[i] for i in frontier(points)]
        axes.step(
            [x for x, _ in line], [y for _, y in line], where="post", color=color, linewidth=1.4, alpha=0.6, zorder=2
        )
        for mark, (x, y), (_, low, high) in zip(marks, points, values, strict=True):
            axes.plot([x, x], [low, high], color=color, linewidth=2, alpha=0.35, zorder=3)
            axes.plot(x, y, marker="o", markersize=6, color=color if (x, y) in line else MUTED, zorder=4)
            axes.annotate(
                mark.name, (x, y), xytext=(7, -3), textcoords="offset points", fontsize=8, color=INK, zorder=5
            )
        tidy(axes, "")
        most = max(x for x, _ in points)
        axes.set_xlim(0, 1.45 * most or 1)  # room for names
        margin = 0.12 * max(top - bottom, 5)
        axes.set_ylim(bottom - margin, top + 2 * margin)
        axes.set_xlabel(name, fontsize=9, color=MUTED)
    heading(figure, 0.03, title, note)
    save_figure(figure, path)
