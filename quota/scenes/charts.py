"""Charts: a bar chart with coloured, labelled bars and their values above them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from quota.scenes.generate import Question
from quota.scenes.pages import INK, Mark, Page, paper, write
from quota.scenes.vocabulary import COLORS, ITEMS, NUMBERS

SIZES = ((240, 160), (240, 240), (320, 160), (320, 240))
TASKS = ("bar_value", "bar_extreme", "bar_color", "bar_compare")
_PITCH_PX, _BAR_PX, _FOOT_PX, _HEAD_PX = 60, 32, 26, 22


def make(rng: np.random.Generator, width_px: int, height_px: int) -> tuple[tuple[str, str, int], ...]:
    """(label, colour, value) of 3 to width / 60 bars; labels, colours and values are distinct."""
    bars = int(rng.integers(3, (width_px - 8) // _PITCH_PX + 1))
    names, colors, values = (rng.permutation(n)[:bars] for n in (len(ITEMS), len(COLORS), 9))
    return tuple((ITEMS[n], tuple(COLORS)[c], int(v) + 1) for n, c, v in zip(names, colors, values, strict=True))


def _bars(page: Page) -> list[tuple[float, float, float, float]]:
    """Box of every bar; a value of 9 reaches the top."""
    left = (page.width_px - _PITCH_PX * len(page.content)) / 2
    base, unit = page.height_px - _FOOT_PX, (page.height_px - _FOOT_PX - _HEAD_PX) / 9
    centres = [left + (i + 0.5) * _PITCH_PX for i in range(len(page.content))]
    return [
        (x - _BAR_PX / 2, base - unit * bar[2], x + _BAR_PX / 2, base)
        for x, bar in zip(centres, page.content, strict=True)
    ]


def marks(page: Page) -> list[Mark]:
    """Bars with their colours, labels below and values above."""
    found = []
    for (name, color, value), (left, top, right, base) in zip(page.content, _bars(page), strict=True):
        x = (left + right) / 2
        found.append(Mark((left, top, right, base), None, color))
        found.append(Mark((x - 22, base + 4, x + 22, base + 22), name))
        found.append(Mark((x - 5, top - 19, x + 5, top - 3), str(value)))
    return found


def draw(page: Page) -> Image.Image:
    """The picture."""
    rng = page.seed("pixels")
    image = paper(rng, page.width_px, page.height_px, 3.0)
    pen = ImageDraw.Draw(image)
    for box, (name, color, value) in zip(_bars(page), page.content, strict=True):
        tint = tuple(int(v) for v in np.clip(np.array(COLORS[color]) + rng.integers(-14, 15, 3), 0, 255))
        pen.rectangle(box, fill=tint)
        x = (box[0] + box[2]) / 2
        write(pen, name, x, box[3] + 13)
        write(pen, str(value), x, box[1] - 11)
    pen.line([4, page.height_px - _FOOT_PX, page.width_px - 4, page.height_px - _FOOT_PX], fill=INK, width=2)
    return image


def questions(page: Page, rng: np.random.Generator) -> list[Question]:
    """One question per task; yes and no equally likely."""
    bars = page.content
    first, second = (bars[i] for i in rng.permutation(len(bars))[:2])
    asked, colored = (bars[int(i)] for i in rng.integers(len(bars), size=2))
    word, extreme = ("highest", max) if rng.random() < 0.5 else ("lowest", min)
    return [
        Question("bar_value", f"what is the value of {asked[0]} ?", NUMBERS[asked[2]]),
        Question("bar_extreme", f"which bar is the {word} ?", extreme(bars, key=lambda bar: bar[2])[0]),
        Question("bar_color", f"what color is the bar of {colored[0]} ?", colored[1]),
        Question("bar_compare", f"is {first[0]} more than {second[0]} ?", "yes" if first[2] > second[2] else "no"),
    ]


def caption(page: Page, rng: np.random.Generator) -> str:
    """Every bar from the left: "red bread seven , blue fish two"."""
    return " , ".join(f"{color} {name} {NUMBERS[value]}" for name, color, value in page.content)
