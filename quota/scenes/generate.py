"""Seeded images and questions. `scene(split, index)` is a pure function; splits cannot overlap.

A scene's content hash decides its split: hash % 10 == 0 is test, == 1 is calibration, the rest is train. A scene drawn
for one split is redrawn until its hash falls there, so no scene of one split can appear in another, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from quota.scenes.vocabulary import COLORS, IMAGE_SIZE, LETTERS, NUMBERS, SHAPES

SPLITS = ("train", "calibration", "test")
TASKS = ("existence", "attribute", "position", "relation", "counting", "choice")
_MARGIN_PX = 10  # between objects, and of an object's centre from the middle lines: "top left" is never ambiguous


@dataclass(frozen=True)
class Thing:
    """One object. Centre and radius in pixels of a `Scene.size_px` square picture."""

    shape: str
    color: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    def quadrant(self, size_px: int) -> str:
        return f"{'top' if self.y < size_px / 2 else 'bottom'} {'left' if self.x < size_px / 2 else 'right'}"


@dataclass(frozen=True)
class Question:
    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    split: str
    index: int
    size_px: int
    things: tuple[Thing, ...]

    def seed(self, purpose: str) -> np.random.Generator:
        return seeded(self.split, self.index, purpose, 0)


def seeded(split: str, index: int, purpose: str, attempt: int) -> np.random.Generator:
    """The generator of one purpose of one image; a pure function, alike on every machine."""
    digest = hashlib.sha256(f"{split}/{index}/{purpose}/{attempt}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def split_of(content: tuple[Any, ...]) -> str:
    """The split that what is drawn belongs to, from the content alone."""
    bucket = int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:4], "little") % 10
    return {0: "test", 1: "calibration"}.get(bucket, "train")


def scene(split: str, index: int, size_px: int = IMAGE_SIZE) -> Scene:
    """Scene `index` of `split`: 6-10 objects at 336 px, 2-4 at 168 px (the first training stages)."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    for attempt in range(10_000):
        things = _place(seeded(split, index, f"scene{size_px}", attempt), size_px)
        if split_of(things) == split:
            return Scene(split, index, size_px, things)
    raise RuntimeError("unreachable: one scene in ten belongs to any split")


def _place(rng: np.random.Generator, size_px: int) -> tuple[Thing, ...]:
    wanted = int(rng.integers(6, 11) if size_px >= 300 else rng.integers(2, 5))
    things: list[Thing] = []
    while len(things) < wanted:
        radius = int(rng.integers(13, 23))
        x, y = (int(v) for v in rng.integers(radius + 2, size_px - radius - 2, 2))
        if min(abs(x - size_px / 2), abs(y - size_px / 2)) < _MARGIN_PX:
            continue
        if any(math.hypot(x - o.x, y - o.y) < radius + o.radius + _MARGIN_PX for o in things):
            continue
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        color = tuple(COLORS)[int(rng.integers(len(COLORS)))]
        if any(o.shape == shape and o.color == color for o in things):
            continue  # "the red star" names one object
        things.append(Thing(shape, color, x, y, radius))
    return tuple(things)


# -- drawing -----------------------------------------------------------------------------------------------------------


def draw(s: Scene) -> Image.Image:
    """The image: objects over a noisy light background with thin clutter lines and specks."""
    rng = s.seed("pixels")
    n = s.size_px
    base = rng.integers(205, 245, 3)
    slope = rng.normal(0, 14, (2, 3))
    ramp = np.linspace(-1, 1, n)
    field = base + ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1] + rng.normal(0, 5, (n, n, 3))
    image = Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 8)) * n // 168):
        x0, y0, x1, y1 = (int(v) for v in rng.integers(0, n, 4))
        grey = int(rng.integers(150, 215))
        reach = 60 / max(60.0, math.hypot(x1 - x0, y1 - y0))
        pen.line([x0, y0, x0 + (x1 - x0) * reach, y0 + (y1 - y0) * reach], fill=(grey, grey, grey), width=1)
    colors = tuple(COLORS.values())
    for _ in range(
        int(rng.integers(4, 12)) * n // 168
    ):  # specks in object colours: colour alone does not make an object
        x, y = (int(v) for v in rng.integers(0, n, 2))
        pen.rectangle([x, y, x + 1, y + 1], fill=colors[int(rng.integers(len(colors)))])
    for thing in s.things:
        _draw_thing(image, thing, rng)
    return image


def shape_mask(shape: str, radius: float, side: int, turn: float) -> Image.Image:
    """A `side` x `side` mask of one of SHAPES around its centre, turned by `turn` radians."""
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    c, r = side / 2, radius

    def at(angle: float, radius: float) -> tuple[float, float]:
        return c + radius * math.cos(angle + turn), c + radius * math.sin(angle + turn)

    up = -math.pi / 2
    if shape in ("circle", "ring"):
        pen.ellipse([c - r, c - r, c + r, c + r], fill=255)
        if shape == "ring":
            pen.ellipse([c - 0.55 * r, c - 0.55 * r, c + 0.55 * r, c + 0.55 * r], fill=0)
    elif shape == "square":
        pen.polygon([at(math.pi / 4 + k * math.pi / 2, r * 1.15) for k in range(4)], fill=255)
    elif shape == "diamond":
        pen.polygon([at(k * math.pi / 2, r if k % 2 else 0.62 * r) for k in range(4)], fill=255)
    elif shape == "triangle":
        pen.polygon([at(up + k * 2 * math.pi / 3, r * 1.1) for k in range(3)], fill=255)
    elif shape == "star":
        pen.polygon([at(up + k * math.pi / 5, r * 1.1 if k % 2 == 0 else 0.45 * r) for k in range(10)], fill=255)
    elif shape == "cross":
        arm = 0.34
        for along in (0.0, math.pi / 2):
            corners = [(-1, -arm), (1, -arm), (1, arm), (-1, arm)]
            points = [at(along + math.atan2(v, u), r * math.hypot(u, v)) for u, v in corners]
            pen.polygon(points, fill=255)
    else:  # heart
        steps = [2 * math.pi * k / 40 for k in range(40)]
        curve = [
            (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
            for t in steps
        ]
        pen.polygon([(c + u * r / 16, c - (v + 2) * r / 16) for u, v in curve], fill=255)
    return mask


def _draw_thing(image: Image.Image, thing: Thing, rng: np.random.Generator) -> None:
    scale = 4  # drawn larger and reduced: smooth edges
    side = (2 * thing.radius + 4) * scale
    mask = shape_mask(thing.shape, thing.radius * scale, side, float(rng.uniform(-0.25, 0.25)))
    mask = mask.resize((side // scale, side // scale), Image.Resampling.LANCZOS)
    tint = np.clip(np.array(COLORS[thing.color]) + rng.integers(-14, 15, 3), 0, 255)
    image.paste(tuple(int(v) for v in tint), (thing.x - mask.width // 2, thing.y - mask.height // 2), mask)
    if rng.random() < 0.15:  # some objects are slightly out of focus
        box = (
            max(0, thing.x - thing.radius - 3),
            max(0, thing.y - thing.radius - 3),
            thing.x + thing.radius + 3,
            thing.y + thing.radius + 3,
        )
        image.paste(image.crop(box).filter(ImageFilter.GaussianBlur(0.7)), box[:2])


# -- questions ---------------------------------------------------------------------------------------------------------


def caption(s: Scene, rng: np.random.Generator) -> str:
    """Every object in random order: "red heart top left , blue star bottom right"."""
    return " , ".join(f"{s.things[i].name} {s.things[i].quadrant(s.size_px)}" for i in rng.permutation(len(s.things)))


def questions(
    s: Scene, per_task: int | Mapping[str, int] = 1, rng: np.random.Generator | None = None
) -> list[Question]:
    """`per_task` questions of each task, or as many as it says per task (fewer where the scene allows none); yes and no
    equally likely."""
    rng = rng or s.seed("questions")
    makers = {
        "existence": _existence,
        "attribute": _attribute,
        "position": _position,
        "relation": _relation,
        "counting": _counting,
        "choice": _choice,
    }
    out: list[Question] = []
    for task in TASKS:
        made = [makers[task](s, rng) for _ in range(per_task if isinstance(per_task, int) else per_task[task])]
        out.extend(dict.fromkeys(q for q in made if q is not None))
    return out


def _pick(rng: np.random.Generator, items: list[Any]) -> Any:
    return items[int(rng.integers(len(items)))] if items else None


def _existence(s: Scene, rng: np.random.Generator) -> Question:
    present = {(t.color, t.shape) for t in s.things}
    if rng.random() < 0.5:
        color, shape = _pick(rng, sorted(present))
        answer = "yes"
    else:  # a hard negative recombines a colour and a shape that are both there
        colors, shapes = sorted({c for c, _ in present}), sorted({h for _, h in present})
        absent = [(c, h) for c in colors for h in shapes if (c, h) not in present]
        if not absent or rng.random() < 0.2:
            absent = [(c, h) for c in COLORS for h in SHAPES if (c, h) not in present]
        color, shape = _pick(rng, absent)
        answer = "no"
    return Question("existence", f"is there {color} {shape} in the picture ?", answer)


def _attribute(s: Scene, rng: np.random.Generator) -> Question | None:
    shape_count, color_count = Counter(t.shape for t in s.things), Counter(t.color for t in s.things)
    options = [
        Question("attribute", f"what color is the {t.shape} ?", t.color) for t in s.things if shape_count[t.shape] == 1
    ]
    options += [
        Question("attribute", f"what shape is the {t.color} object ?", t.shape)
        for t in s.things
        if color_count[t.color] == 1
    ]
    return _pick(rng, options)


def _position(s: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(rng, list(s.things))
    return Question("position", f"where is the {thing.name} ?", thing.quadrant(s.size_px))


def _relation(s: Scene, rng: np.random.Generator) -> Question | None:
    gap = 30
    word, axis = ("left of", "x") if rng.random() < 0.5 else ("above", "y")
    pairs = [(a, b) for a in s.things for b in s.things if abs(getattr(a, axis) - getattr(b, axis)) >= gap]
    pair = _pick(rng, pairs)
    if pair is None:
        return None
    a, b = pair
    answer = "yes" if getattr(a, axis) < getattr(b, axis) else "no"
    return Question("relation", f"is the {a.name} {word} the {b.name} ?", answer)


def _counting(s: Scene, rng: np.random.Generator) -> Question:
    if rng.random() < 0.5:
        count = Counter(t.shape for t in s.things)
        n = _pick(rng, sorted({count[w] for w in SHAPES}))  # each possible count equally likely
        word = _pick(rng, [w for w in SHAPES if count[w] == n])
        return Question("counting", f"how many {word} objects are there ?", NUMBERS[n])
    count = Counter(t.color for t in s.things)
    n = _pick(rng, sorted({count[w] for w in COLORS}))
    word = _pick(rng, [w for w in COLORS if count[w] == n])
    return Question("counting", f"how many {word} objects are there ?", NUMBERS[n])


def _choice(s: Scene, rng: np.random.Generator) -> Question | None:
    count = Counter(t.shape for t in s.things)
    thing = _pick(rng, [t for t in s.things if count[t.shape] == 1])
    if thing is None:
        return None
    others = [c for c in COLORS if c != thing.color]
    options = [thing.color, *(others[int(i)] for i in rng.permutation(len(others))[:3])]
    options = [options[int(i)] for i in rng.permutation(4)]
    listed = " ".join(f"{letter} . {word}" for letter, word in zip(LETTERS, options, strict=True))
    return Question(
        "choice",
        f"what color is the {thing.shape} ? {listed} answer with the letter .",
        LETTERS[options.index(thing.color)],
    )


def patch_labels(s: Scene, patch_px: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """Per patch (raster order): shape index and colour index of the object whose centre region covers it; -1
    background, -2 undecided."""
    side = s.size_px // patch_px
    centre = (np.arange(side) + 0.5) * patch_px
    shape, color = np.full((side, side), -1), np.full((side, side), -1)
    names = tuple(COLORS)
    for t in s.things:
        distance = np.hypot(centre[None, :] - t.x, centre[:, None] - t.y)
        edge, inside = distance < t.radius + patch_px * 0.7, distance < t.radius * 0.8
        shape[edge & ~inside], color[edge & ~inside] = -2, -2
        shape[inside], color[inside] = SHAPES.index(t.shape), names.index(t.color)
    return shape.ravel(), color.ravel()
