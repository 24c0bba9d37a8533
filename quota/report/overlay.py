"""Which visual tokens each pruning layer kept, over the image: kept patches bright, dropped ones dark and grey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from quota.core.errors import UsageError
from quota.core.images import to_rgb
from quota.report.style import FAINT, GOLD, INK, MUTED, ORANGE, add_axes, new_figure, save_figure

_PANEL_PX = 672
_NIGHT = np.array([14, 18, 28], dtype=np.float64)
_PER_ROW = 4


def model_view(image: Image.Image, side_px: int = _PANEL_PX) -> Image.Image:
    """What a CLIP processor shows the model: the centre square of the shorter edge, as RGB of side `side_px`.

    CLIP resizes the shorter edge, then cuts the centre; cutting first keeps the resolution for drawing.
    """
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return to_rgb(image).resize((side_px, side_px), Image.Resampling.LANCZOS, box=(left, top, left + edge, top + edge))


def dim_dropped(view: Image.Image, kept: np.ndarray) -> Image.Image:
    """`view` with the patches where `kept` [rows, columns] bool is False turned dark grey."""
    pixels = np.asarray(view, dtype=np.float64)
    rows, columns = kept.shape
    y = np.arange(view.height) * rows // view.height
    x = np.arange(view.width) * columns // view.width
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    dark = 0.70 * _NIGHT + 0.30 * grey[..., None]
    return Image.fromarray(np.where(kept[y][:, x][..., None], pixels, dark).round().astype(np.uint8))


def edges(kept: np.ndarray) -> list[list[tuple[float, float]]]:
    """Line segments ((x0, y0), (x1, y1)) in patch units between kept and dropped patches, joined along straight
    runs."""
    padded = np.pad(kept, 1)
    across = padded[1:, 1:-1] != padded[:-1, 1:-1]  # [rows + 1, columns]: horizontal lines
    along = (padded[1:-1, 1:] != padded[1:-1, :-1]).T  # [columns + 1, rows]: vertical lines
    segments: list[list[tuple[float, float]]] = []
    for lines, horizontal in ((across, True), (along, False)):
        for place, line in enumerate(lines):
            changes = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
            for start, end in zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True):
                segments.append([(start, place), (end, place)] if horizontal else [(place, start), (place, end)])
    return segments


def whole_view(image: Image.Image, grid: tuple[int, int], side_px: int = _PANEL_PX) -> Image.Image:
    """What a processor of dynamic resolution shows: the whole image in the shape of its token grid (rows, columns),
    longer side `side_px`."""
    rows, columns = grid
    scale = side_px / max(rows, columns)
    return to_rgb(image).resize((round(columns * scale), round(rows * scale)), Image.Resampling.LANCZOS)


def save_overlay(
    path: str | Path,
    images: Image.Image | Sequence[Image.Image],
    kept: Mapping[int, Any],
    grids: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Write the PNG: per image one row of panels, the image first, then one panel per pruning layer.

    kept: layer -> bool array or tensor [V], raster order over all images in prompt order.
    grids: (rows, columns) of each image's tokens, which then show the whole image; None: equal squares. UsageError
    when a mask does not fit.
    """
    shown = [images] if isinstance(images, Image.Image) else list(images)
    if not shown or not kept:
        raise UsageError(
            f"overlay: expected an image and at least one pruning layer, got {len(shown)} images and {len(kept)} layers"
        )
    masks = {layer: _per_image(layer, mask, len(shown), grids) for layer, mask in sorted(kept.items())}
    rows_each = math.ceil((1 + len(masks)) / _PER_ROW)
    columns = math.ceil((1 + len(masks)) / rows_each)
    sheet = _Sheet(columns, rows_each * len(shown))
    for number, image in enumerate(shown):
        view, row = whole_view(image, grids[number]) if grids else model_view(image), number * rows_each
        name = "image" if len(shown) == 1 else f"image {number + 1}"
        sheet.panel(row, 0, view, name, f"{next(iter(masks.values()))[number].size} visual tokens")
        for i, (layer, per_picture) in enumerate(masks.items(), start=1):
            mask = per_picture[number]
            alive, place = int(mask.sum()), f"layer {layer}" if layer else "before layer 0"
            axes = sheet.panel(
                row + i // columns,
                i % columns,
                dim_dropped(view, mask),
                place,
                f"{alive} kept, {alive / mask.size:.0%}",
            )
            _outline(axes, mask, view.width)
            _gauge(axes, alive / mask.size)
    save_figure(sheet.figure, path)


def _per_image(layer: int, mask: Any, images: int, grids: Sequence[tuple[int, int]] | None) -> list[np.ndarray]:
    values = np.asarray(mask, dtype=bool).ravel()
    side = math.isqrt(values.size // images)
    shapes = list(grids) if grids else [(side, side)] * images
    sizes = [rows * columns for rows, columns in shapes]
    if len(shapes) != images or 0 in sizes or sum(sizes) != values.size:
        wanted = (
            " + ".join(f"{rows} x {columns}" for rows, columns in shapes)
            if grids
            else f"{images} square grid{'s' if images > 1 else ''}"
        )
        raise UsageError(
            f"overlay: layer {layer}: expected a mask of {wanted}, got {values.size} tokens; pass every image of the"
            " prompt"
        )
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


class _Sheet:
    """Square panels on a grid, sizes in inches."""

    panel_in, gap_in, head_in, foot_in, margin_in = 2.7, 0.22, 0.5, 0.1, 0.2

    def __init__(self, columns: int, rows: int) -> None:
        self.width_in = 2 * self.margin_in + columns * self.panel_in + (columns - 1) * self.gap_in
        self.height_in = self.margin_in / 2 + rows * (self.head_in + self.panel_in + self.foot_in)
        self.figure: Figure = new_figure(self.width_in, self.height_in)

    def panel(self, row: int, column: int, image: Image.Image, title: str, note: str) -> Axes:
        left = self.margin_in + column * (self.panel_in + self.gap_in)
        top = row * (self.head_in + self.panel_in + self.foot_in) + self.head_in
        bottom = self.height_in - top - self.panel_in
        axes = add_axes(
            self.figure,
            (
                left / self.width_in,
                bottom / self.height_in,
                self.panel_in / self.width_in,
                self.panel_in / self.height_in,
            ),
        )
        axes.imshow(np.asarray(image), interpolation="antialiased")
        axes.set_axis_off()
        axes.text(0, 1.035, title, transform=axes.transAxes, fontsize=11, fontweight="bold", color=INK, va="bottom")
        axes.text(1, 1.039, note, transform=axes.transAxes, fontsize=9, color=MUTED, va="bottom", ha="right")
        return axes


def _outline(axes: Axes, mask: np.ndarray, width_px: int) -> None:
    cell = width_px / mask.shape[1]
    lines = [[(x * cell - 0.5, y * cell - 0.5) for x, y in segment] for segment in edges(mask)]
    axes.add_collection(LineCollection(lines, colors=GOLD, linewidths=0.7, alpha=0.9, capstyle="projecting"))


def _gauge(axes: Axes, share: float) -> None:
    """A bar under the title: the share of tokens still alive."""
    for width, color in ((1.0, FAINT), (share, ORANGE)):
        axes.add_patch(
            Rectangle(
                (0, 1.012), width, 0.012, transform=axes.transAxes, facecolor=color, edgecolor="none", clip_on=False
            )
        )
