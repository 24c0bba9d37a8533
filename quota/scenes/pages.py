"""What images with text have in common: a page, its font, and where its words are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from quota.scenes.generate import seeded
from quota.scenes.vocabulary import COLORS, DIGITS, NUMBERS, QWEN_PATCH_SIZE, READABLE

FONT_PX = 18
# words stand on a grid of patches, as type does: a tower this small learns to read in minutes, not days
GRID_PX = QWEN_PATCH_SIZE
INK = (24, 24, 28)
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Page:
    """Image `index` of a split of one kind: what is on it (`content`, plain tuples) and its size. Text-only pages
    have size (0, 0)."""

    kind: str
    split: str
    index: int
    width_px: int
    height_px: int
    content: tuple[Any, ...]

    def seed(self, purpose: str) -> np.random.Generator:
        return seeded(self.split, self.index, f"{self.kind} {purpose}", 0)


@dataclass(frozen=True)
class Mark:
    """A box that shows a readable word or digit, or has a colour, or both; what dense supervision tells the visual
    tokens inside."""

    box: Box
    word: str | None = None
    color: str | None = None


@lru_cache(maxsize=4)
def font(size_px: int = FONT_PX) -> Any:
    """The scalable font that comes with Pillow."""
    return ImageFont.load_default(size_px)


def write(pen: ImageDraw.ImageDraw, text: str, x: float, y: float, fill: tuple[int, int, int] = INK) -> Box:
    """Draw `text` centred at (x, y); returns the box of its ink."""
    pen.text((x, y), text, font=font(), fill=fill, anchor="mm")
    left, top, right, bottom = pen.textbbox((x, y), text, font=font(), anchor="mm")
    return left, top, right, bottom


def text_width_px(text: str) -> float:
    return float(font().getlength(text))


def paper(rng: np.random.Generator, width_px: int, height_px: int, noise: float) -> Image.Image:
    """A light background with a slight ramp and pixel noise of standard deviation `noise`."""
    base = rng.integers(222, 250, 3)
    ramp = np.linspace(-1, 1, height_px)[:, None, None] * rng.normal(0, 6, 3)
    field = base + ramp + rng.normal(0, noise, (height_px, width_px, 3))
    return Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))


WORD_CLASSES = (*READABLE, *NUMBERS)  # a drawn digit is labelled with its number word


def labels(
    marks: list[Mark], width_px: int, height_px: int, token_px: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per visual token (raster order): index into SHAPES, COLORS and WORD_CLASSES; -1 background, -2 undecided. Pages
    have no shapes."""
    columns, rows = width_px // token_px, height_px // token_px
    x, y = np.meshgrid((np.arange(columns) + 0.5) * token_px, (np.arange(rows) + 0.5) * token_px)
    color, word = np.full((rows, columns), -1), np.full((rows, columns), -1)
    names = tuple(COLORS)
    for mark in marks:
        near, inside = (_covers(mark.box, x, y, reach) for reach in (0.75 * token_px, 0.3 * token_px))
        if mark.color is not None:
            core = _covers(mark.box, x, y, -0.2 * token_px)
            color[near & ~core], color[core] = -2, names.index(mark.color)
        if mark.word is not None:
            name = NUMBERS[int(mark.word)] if mark.word in DIGITS else mark.word
            word[near & ~inside], word[inside] = -2, WORD_CLASSES.index(name)
    return np.full(rows * columns, -1), color.ravel(), word.ravel()


def _covers(box: Box, x: np.ndarray, y: np.ndarray, reach: float) -> np.ndarray:
    return (x > box[0] - reach) & (x < box[2] + reach) & (y > box[1] - reach) & (y < box[3] + reach)
