"""Crowds: harder images. Ten to twenty objects of two sizes and four textures, and up to two signs to read.

`crowd(split, index)` is a pure function; as with scenes the content's hash decides the split. What is asked about them
is in `crowd_questions`, what is said about them in `captions`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from quota.scenes import generate as g
from quota.scenes.pages import FONT_PX, text_width_px, write
from quota.scenes.vocabulary import COLORS, IMAGE_SIZE, SHAPES, SIGN_WORDS

TEXTURES = ("plain", "striped", "dotted", "checked")
RADII_PX = {"small": (11, 13), "large": (19, 22)}  # inclusive; far enough apart to be told without a ruler
ATTRIBUTES = ("size", "texture", "color", "shape")
_GAP_PX, _MIDDLE_PX, _SIGN_PAD_PX = 5, 8, 6
_DARK_LETTERS = ("yellow", "cyan", "orange")
CHANGES = ("gone", "added", "color", "texture")


@dataclass(frozen=True)
class Item:
    """One object. Centre and radius in pixels."""

    size: str
    texture: str
    color: str
    shape: str
    x: int
    y: int
    radius: int

    @property
    def kind(self) -> tuple[str, str, str, str]:
        return self.size, self.texture, self.color, self.shape


@dataclass(frozen=True)
class Sign:
    """A coloured plate with one word, its centre in pixels."""

    word: str
    color: str
    x: int
    y: int

    @property
    def half(self) -> tuple[int, int]:
        """Half its width and height in pixels."""
        return int(text_width_px(self.word) / 2) + _SIGN_PAD_PX, FONT_PX // 2 + _SIGN_PAD_PX


@dataclass(frozen=True)
class Crowd:
    """Image `index` of a split. No two objects are alike in all attributes, no two signs in word or colour."""

    split: str
    index: int
    size_px: int
    items: tuple[Item, ...]
    signs: tuple[Sign, ...]

    def seed(self, purpose: str) -> np.random.Generator:
        return g.seeded(self.split, self.index, f"crowd {purpose}", 0)

    @cached_property
    def names(self) -> dict[Item, str]:
        """The shortest description of each object that fits no other: "red star", "striped red star", "small striped
        red star".
        """
        return {item: shortest_name(item, self.items) for item in self.items}

    def quadrant(self, thing: Item | Sign) -> str:
        half = self.size_px / 2
        return f"{'top' if thing.y < half else 'bottom'} {'left' if thing.x < half else 'right'}"


def shortest_name(item: Item, items: tuple[Item, ...]) -> str:
    """Colour and shape, with texture, size or both in front where another object has the same."""
    for used in (("color", "shape"), ("texture", "color", "shape"), ("size", "color", "shape"), ATTRIBUTES):
        words = tuple(getattr(item, name) for name in used)
        if sum(words == tuple(getattr(other, name) for name in used) for other in items) == 1:
            break
    return " ".join(words)


def crowd(split: str, index: int, size_px: int = IMAGE_SIZE) -> Crowd:
    """Crowd `index` of a split; ValueError for an unknown one."""
    if split not in g.SPLITS:
        raise ValueError(f"split: expected one of {g.SPLITS}, got {split!r}")
    for attempt in range(10_000):
        items, signs = _place(g.seeded(split, index, f"crowd{size_px}", attempt), size_px)
        if g.split_of(("crowd", items, signs)) == split:
            return Crowd(split, index, size_px, items, signs)
    raise RuntimeError("unreachable: one crowd in ten belongs to any split")


def _choose(rng: np.random.Generator, names: Any) -> str:
    return tuple(names)[int(rng.integers(len(names)))]


def _place(rng: np.random.Generator, size_px: int) -> tuple[tuple[Item, ...], tuple[Sign, ...]]:
    taken: list[tuple[float, float, float, float]] = []  # centre, half width, half height

    def free(half_x: int, half_y: int) -> tuple[int, int] | None:
        """A place for a box of that size that touches no other and lies in one quadrant."""
        for _ in range(60):
            x = int(rng.integers(half_x + 2, size_px - half_x - 1))
            y = int(rng.integers(half_y + 2, size_px - half_y - 1))
            if min(abs(x - size_px / 2), abs(y - size_px / 2)) < _MIDDLE_PX:
                continue
            if all(abs(x - a) > half_x + w + _GAP_PX or abs(y - b) > half_y + h + _GAP_PX for a, b, w, h in taken):
                taken.append((x, y, half_x, half_y))
                return x, y
        return None

    signs: list[Sign] = []
    words, colors = rng.permutation(len(SIGN_WORDS)), rng.permutation(len(COLORS))
    for number in range(int(rng.integers(3))):
        sign = Sign(SIGN_WORDS[words[number]], tuple(COLORS)[colors[number]], 0, 0)
        place = free(*sign.half)
        if place is not None:
            signs.append(replace(sign, x=place[0], y=place[1]))
    items: list[Item] = []
    wanted, tries = int(rng.integers(10, 21)), 0
    # a few colours and shapes return more often than others: counts above two, and objects that differ in one attribute
    # only
    favoured = [([tuple(names)[i] for i in rng.permutation(len(names))[:3]], names) for names in (COLORS, SHAPES)]
    while len(items) < wanted and tries < 200:
        tries += 1
        size, texture = _choose(rng, RADII_PX), _choose(rng, TEXTURES)
        color, shape = (_choose(rng, often if rng.random() < 0.4 else names) for often, names in favoured)
        if any(item.kind == (size, texture, color, shape) for item in items):
            continue
        radius = int(rng.integers(RADII_PX[size][0], RADII_PX[size][1] + 1))
        place = free(radius, radius)
        if place is not None:
            items.append(Item(size, texture, color, shape, *place, radius))
    return tuple(items), tuple(signs)


# -- drawing -----------------------------------------------------------------------------------------------------------


def draw(c: Crowd) -> Image.Image:
    """The image: objects and signs over a light noisy background with thin lines and specks in object colours."""
    rng = c.seed("pixels")
    n = c.size_px
    ramp = np.linspace(-1, 1, n)
    slope = rng.normal(0, 12, (2, 3))
    field = (
        rng.integers(208, 245, 3)
        + ramp[:, None, None] * slope[0]
        + ramp[None, :, None] * slope[1]
        + rng.normal(0, 5, (n, n, 3))
    )
    image = Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 12))):
        x, y, across, down = (int(v) for v in (*rng.integers(0, n, 2), *rng.integers(-50, 51, 2)))
        grey = int(rng.integers(150, 215))
        pen.line([x, y, x + across, y + down], fill=(grey, grey, grey), width=1)
    for _ in range(int(rng.integers(6, 20))):
        x, y = (int(v) for v in rng.integers(0, n, 2))
        pen.rectangle([x, y, x + 1, y + 1], fill=COLORS[_choose(rng, COLORS)])
    for item in c.items:
        _draw_item(image, item, rng)
    for sign in c.signs:
        half_x, half_y = sign.half
        box = (sign.x - half_x, sign.y - half_y, sign.x + half_x, sign.y + half_y)
        pen.rounded_rectangle(box, radius=4, fill=_tint(sign.color, rng))
        write(pen, sign.word, sign.x, sign.y, (20, 20, 20) if sign.color in _DARK_LETTERS else (250, 250, 250))
    return image


def _tint(color: str, rng: np.random.Generator) -> tuple[int, int, int]:
    r, green, b = (int(v) for v in np.clip(np.array(COLORS[color]) + rng.integers(-14, 15, 3), 0, 255))
    return r, green, b


def _draw_item(image: Image.Image, item: Item, rng: np.random.Generator) -> None:
    scale = 4  # drawn larger and reduced: smooth edges
    side = (2 * item.radius + 4) * scale
    mask = g.shape_mask(item.shape, item.radius * scale, side, float(rng.uniform(-0.25, 0.25)))
    tint = _tint(item.color, rng)
    face = Image.new("RGB", (side, side), tint)
    pale: tuple[int, ...] = tuple(int(0.4 * v + 0.6 * 250) for v in tint)
    pen = ImageDraw.Draw(face)
    pitch = 7 * scale if item.size == "large" else 6 * scale
    start = int(rng.integers(0, pitch))
    cells = range(start - pitch, side + pitch, pitch)
    if item.texture == "striped":
        for at in cells:
            pen.rectangle([at, 0, at + pitch * 2 // 5, side], fill=pale)
    elif item.texture == "dotted":
        dot = pitch * 0.27
        for number, y in enumerate(cells):
            for x in cells:
                x_centre = x + (pitch // 2 if number % 2 else 0)
                pen.ellipse([x_centre - dot, y - dot, x_centre + dot, y + dot], fill=pale)
    elif item.texture == "checked":
        for number, y in enumerate(cells):
            for x in cells:
                left = x + (pitch // 2 if number % 2 else 0)
                pen.rectangle([left, y, left + pitch // 2 - 1, y + pitch - 1], fill=pale)
    small = (side // scale, side // scale)
    face, mask = (part.resize(small, Image.Resampling.LANCZOS) for part in (face, mask))
    image.paste(face, (item.x - small[0] // 2, item.y - small[1] // 2), mask)


# -- two images ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """Two images that differ in one object. what: one of CHANGES. said: the sentence that says it."""

    before: Crowd
    after: Crowd
    what: str
    said: str


def change(split: str, index: int, size_px: int = IMAGE_SIZE) -> Change:
    """Crowd `index` of a split beside itself after one change; objects stay where they are. Both images belong to the
    split.
    """
    whole = crowd(split, index, size_px)
    for attempt in range(10_000):
        rng = whole.seed(f"change {attempt}")
        what, item = _choose(rng, CHANGES), whole.items[int(rng.integers(len(whole.items)))]
        without = replace(whole, items=tuple(other for other in whole.items if other is not item))
        name = whole.names[item]
        if what == "gone":
            found = Change(whole, without, what, f"the {name} is gone")
        elif what == "added":
            found = Change(without, whole, what, f"the {name} was added")
        else:
            word = _choose(rng, [w for w in (COLORS if what == "color" else TEXTURES) if w != getattr(item, what)])
            new = replace(item, color=word) if what == "color" else replace(item, texture=word)
            if new.kind in {other.kind for other in whole.items}:
                continue
            items = tuple(new if other is item else other for other in whole.items)
            found = Change(whole, replace(whole, items=items), what, f"the {name} became {word}")
        if all(g.split_of(("crowd", c.items, c.signs)) == split for c in (found.before, found.after)):
            return found
    raise RuntimeError("unreachable: one change in ten keeps the split")


def patch_labels(c: Crowd, patch_px: int = 14) -> dict[str, np.ndarray]:
    """Per patch in raster order, int64: indices into RADII_PX, TEXTURES, COLORS, SHAPES and SIGN_WORDS (`word`); -1
    nothing, -2 undecided.
    """
    side = c.size_px // patch_px
    centre = (np.arange(side) + 0.5) * patch_px
    out = {name: np.full((side, side), -1) for name in (*ATTRIBUTES, "word")}
    classes: dict[str, tuple[str, ...]] = {
        "size": tuple(RADII_PX),
        "texture": TEXTURES,
        "color": tuple(COLORS),
        "shape": SHAPES,
    }
    for item in c.items:
        distance = np.hypot(centre[None, :] - item.x, centre[:, None] - item.y)
        nearest = distance == distance.min()
        edge, inside = distance < item.radius + patch_px * 0.6, (distance < item.radius * 0.8) | nearest
        for name, words in classes.items():
            out[name][edge & ~inside], out[name][inside] = -2, words.index(getattr(item, name))
    for sign in c.signs:
        half_x, half_y = sign.half
        across, down = np.abs(centre[None, :] - sign.x), np.abs(centre[:, None] - sign.y)
        inside = (across < half_x - 2) & (down < max(half_y - 4, patch_px * 0.5))
        edge = (across < half_x + patch_px * 0.5) & (down < half_y + patch_px * 0.5)
        for name in classes:
            out[name][edge] = -2
        out["color"][inside] = classes["color"].index(sign.color)
        out["word"][edge & ~inside], out["word"][inside] = -2, SIGN_WORDS.index(sign.word)
    return {name: found.ravel() for name, found in out.items()}
