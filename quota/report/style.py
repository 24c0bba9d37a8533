"""One look for every figure: colours, type, and saving without half-written files or time stamps."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from quota.core.files import atomic_write_bytes

INK = "#1f2430"
MUTED = "#6b7280"
FAINT = "#e6e8ec"
BLUE = "#2f6fde"
TEAL = "#0f9d8a"
ORANGE = "#e4702a"
PEACH = "#fbe0cd"
RUST = "#b4531a"
VIOLET = "#7c5cd6"
GOLD = "#ffc53d"
BAND = "#fff3e6"  # behind the candidate layers
DPI = 150

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b6bcc6",
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
}


def new_figure(width_in: float, height_in: float) -> Figure:
    """A white figure outside pyplot: no global state, safe in any thread."""
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(width_in, height_in), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        return figure


def add_axes(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    """Axes at (left, bottom, width, height) in figure shares."""
    with mpl.rc_context(_RC):
        return figure.add_axes(box)


def heading(figure: Figure, left: float, title: str, note: str) -> None:
    """The figure's title and the quieter line under it, at share `left` of the width."""
    height_in = figure.get_figheight()
    figure.text(left, 1 - 0.40 / height_in, title, fontsize=14, fontweight="bold", color=INK)
    figure.text(left, 1 - 0.66 / height_in, note, fontsize=9.5, color=MUTED)


def tidy(axes: Axes, title: str, note: str = "") -> None:
    """Title at the left with a quieter second line; light horizontal grid; no box."""
    lift = 1.13 if note else 1.05
    axes.text(0, lift, title, transform=axes.transAxes, fontsize=11.5, fontweight="bold", color=INK, va="bottom")
    if note:
        axes.text(0, 1.04, note, transform=axes.transAxes, fontsize=8.6, color=MUTED, va="bottom")
    axes.grid(axis="y", color=FAINT, linewidth=0.9)
    axes.tick_params(length=0, labelsize=9, labelcolor=MUTED)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b6bcc6")


def save_figure(figure: Figure, path: str | Path) -> None:
    """PNG, written atomically; the same figure gives the same bytes."""
    out = io.BytesIO()
    with mpl.rc_context(_RC):
        figure.savefig(out, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    atomic_write_bytes(path, out.getvalue())
