"""Documents: a page with a small table of words and digits."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from quota.scenes.generate import Question
from quota.scenes.pages import GRID_PX, INK, Box, Mark, Page, paper, write
from quota.scenes.vocabulary import COLUMNS, ITEMS, NUMBERS

SIZES = ((160, 160), (240, 160), (240, 240), (320, 160))
TASKS = ("cell", "lookup_item", "row_count")
_ROW_PX = 30
_Content = tuple[tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]


def make(rng: np.random.Generator, width_px: int, height_px: int) -> _Content:
    """(column names, ((item, digits), ...)): 2 to 9 rows that fit, 1 column at 160 px, up to 2 above."""
    columns = tuple(
        COLUMNS[i] for i in rng.permutation(len(COLUMNS))[: 1 if width_px < 240 else int(rng.integers(1, 3))]
    )
    rows = int(rng.integers(2, min(height_px // _ROW_PX, len(NUMBERS))))
    items = [ITEMS[i] for i in rng.permutation(len(ITEMS))[:rows]]
    return columns, tuple((item, tuple(int(v) for v in rng.integers(0, 10, len(columns)))) for item in items)


def _layout(page: Page) -> tuple[list[Mark], Box]:
    """Every word and digit with the centre of its cell, and the frame of the table."""
    columns, rows = page.content
    rng = page.seed("layout")
    pitch = 80 if page.width_px > 80 * (len(columns) + 1) else 60
    width, height = pitch * (len(columns) + 1), _ROW_PX * (len(rows) + 1)
    left, top = (
        GRID_PX * int(rng.integers(0, max(0, side - used - 1) // GRID_PX + 1))
        for side, used in ((page.width_px, width), (page.height_px, height))
    )
    cells = [("item", *columns), *((item, *map(str, values)) for item, values in rows)]
    found = []
    for i, cell_row in enumerate(cells):
        for j, text in enumerate(cell_row):
            x, y, half = left + (j + 0.5) * pitch, top + (i + 0.5) * _ROW_PX, 5 if len(text) == 1 else 24
            found.append(Mark((x - half, y - 9, x + half, y + 9), text))
    return found, (left, top, left + width, top + height)


def marks(page: Page) -> list[Mark]:
    """Every word and digit of the table."""
    return _layout(page)[0]


def draw(page: Page) -> Image.Image:
    """The image: the table in dark ink, with or without lines between the cells."""
    rng = page.seed("pixels")
    image = paper(rng, page.width_px, page.height_px, 3.0)
    pen = ImageDraw.Draw(image)
    found, (left, top, right, bottom) = _layout(page)
    pen.line([left, top + _ROW_PX, right, top + _ROW_PX], fill=INK, width=2)
    if rng.random() < 0.5:
        pen.rectangle([left, top, right, bottom], outline=INK)
        for y in np.arange(top + 2 * _ROW_PX, bottom - 1, _ROW_PX):
            pen.line([left, y, right, y], fill=(150, 150, 150))
    for mark in found:
        write(pen, str(mark.word), (mark.box[0] + mark.box[2]) / 2, (mark.box[1] + mark.box[3]) / 2)
    return image


def questions(page: Page, rng: np.random.Generator) -> list[Question]:
    """One question per task; the item of a number is asked only where it is unique in its column."""
    columns, rows = page.content
    item, values = rows[int(rng.integers(len(rows)))]
    column = int(rng.integers(len(columns)))
    made = [Question("cell", f"what is the {columns[column]} of {item} ?", NUMBERS[values[column]])]
    unique = [(name, v[column]) for name, v in rows if sum(o[column] == v[column] for _, o in rows) == 1]
    if unique:
        name, value = unique[int(rng.integers(len(unique)))]
        made.append(Question("lookup_item", f"which item has {columns[column]} {NUMBERS[value]} ?", name))
    return [*made, Question("row_count", "how many rows are in the picture ?", NUMBERS[len(rows)])]


def caption(page: Page, rng: np.random.Generator) -> str:
    """The table row by row: "item price , bread seven , fish two"."""
    columns, rows = page.content
    lines = [" ".join(("item", *columns)), *(" ".join((item, *(NUMBERS[v] for v in values))) for item, values in rows)]
    return " , ".join(lines)
