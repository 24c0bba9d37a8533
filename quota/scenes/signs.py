"""Scene text: a few coloured plates with one rendered word each, on a noisy background."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from quota.scenes.generate import Question
from quota.scenes.pages import FONT_PX, GRID_PX, Mark, Page, paper, text_width_px, write
from quota.scenes.vocabulary import COLORS, SIGN_WORDS

SIZES = ((240, 160), (160, 240), (240, 240), (320, 240))
TASKS = ("sign_word", "sign_color", "word_there")
_PAD_PX = 8
_LIGHT = ("yellow", "cyan", "orange")  # these plates carry dark letters


def make(rng: np.random.Generator, width_px: int, height_px: int) -> tuple[tuple[str, str, int, int], ...]:
    """(word, colour, centre x, centre y) of 2-4 plates that do not touch; words and colours are distinct."""
    wanted = int(rng.integers(2, 5))
    words, colors = (rng.permutation(len(names))[:wanted] for names in (SIGN_WORDS, COLORS))
    plates: list[tuple[str, str, int, int]] = []
    for word, color in zip((SIGN_WORDS[i] for i in words), (tuple(COLORS)[i] for i in colors), strict=True):
        half_width, half_height = _half(word)
        for _ in range(40):  # where no place is left the page has a plate less
            x, y = (
                GRID_PX * int(rng.integers(-(-(half + 2) // GRID_PX), (side - half - 2) // GRID_PX + 1))
                for half, side in ((half_width, width_px), (half_height, height_px))
            )
            if all(
                abs(x - o[2]) > half_width + _half(o[0])[0] + 6 or abs(y - o[3]) > half_height + _half(o[0])[1] + 6
                for o in plates
            ):
                plates.append((word, color, x, y))
                break
    return tuple(plates)


def _half(word: str) -> tuple[int, int]:
    return int(text_width_px(word) / 2) + _PAD_PX, FONT_PX // 2 + _PAD_PX


def draw(page: Page) -> Image.Image:
    """The picture."""
    rng = page.seed("pixels")
    image = paper(rng, page.width_px, page.height_px, 7.0)
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 10))):
        x0, y0, x1, y1 = (int(v) for v in (*rng.integers(0, page.width_px, 2), *rng.integers(0, page.height_px, 2)))
        grey = int(rng.integers(160, 215))
        pen.line([x0, x1, y0, y1], fill=(grey, grey, grey), width=1)
    for word, color, x, y in page.content:
        half_width, half_height = _half(word)
        tint = tuple(int(v) for v in np.clip(np.array(COLORS[color]) + rng.integers(-14, 15, 3), 0, 255))
        pen.rounded_rectangle([x - half_width, y - half_height, x + half_width, y + half_height], radius=4, fill=tint)
        write(pen, word, x, y, (20, 20, 20) if color in _LIGHT else (250, 250, 250))
    return image


def marks(page: Page) -> list[Mark]:
    """The words with their plates' colours."""
    found = []
    for word, color, x, y in page.content:
        half_width, half_height = _half(word)
        found.append(Mark((x - half_width, y - half_height, x + half_width, y + half_height), None, color))
        found.append(Mark((x - half_width + _PAD_PX, y - FONT_PX / 2, x + half_width - _PAD_PX, y + FONT_PX / 2), word))
    return found


def questions(page: Page, rng: np.random.Generator) -> list[Question]:
    """One question per task; yes and no equally likely."""
    word, color = page.content[int(rng.integers(len(page.content)))][:2]
    other_word, other_color = page.content[int(rng.integers(len(page.content)))][:2]
    shown = {plate[0] for plate in page.content}
    absent = [w for w in SIGN_WORDS if w not in shown]
    asked, answer = (word, "yes") if rng.random() < 0.5 else (absent[int(rng.integers(len(absent)))], "no")
    return [
        Question("sign_word", f"what word is on the {color} sign ?", word),
        Question("sign_color", f"what color is the sign that says {other_word} ?", other_color),
        Question("word_there", f"is there a sign that says {asked} ?", answer),
    ]


def caption(page: Page, rng: np.random.Generator) -> str:
    """Every sign: "red sign open , blue sign taxi"."""
    return " , ".join(f"{page.content[i][1]} sign {page.content[i][0]}" for i in rng.permutation(len(page.content)))
