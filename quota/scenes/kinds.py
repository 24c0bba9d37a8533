"""The five kinds of the mixed set: conversation (scenes of objects), text only, scene text, document and chart, in
miniature.

`page(kind, split, index)` is a pure function, and as with scenes the content's hash decides the split, so no content of
one split can appear in
another. Conversation has square images; the other images come in several sizes and shapes, which is what dynamic
resolution is about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from quota.scenes import charts, documents, signs, texts
from quota.scenes import generate as g
from quota.scenes.pages import Mark, Page, labels
from quota.scenes.vocabulary import CAPTION_REQUEST, QWEN_SCENE_PX, QWEN_TOKEN_PX, READ_REQUEST

Labels = tuple[np.ndarray, np.ndarray, np.ndarray]
CONVERSATION, TEXT = "conversation", "text"


@dataclass(frozen=True)
class Kind:
    """One kind of page. Text has no sizes and cannot be drawn."""

    tasks: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    make: Callable[..., Any]
    questions: Callable[[Page, np.random.Generator], list[g.Question]]
    caption: Callable[[Page, np.random.Generator], str] | None = None
    draw: Callable[[Page], Image.Image] | None = None
    marks: Callable[[Page], list[Mark]] | None = None


def _written(module: Any) -> Kind:
    return Kind(module.TASKS, module.SIZES, module.make, module.questions, module.caption, module.draw, module.marks)


PAGES: dict[str, Kind] = {
    TEXT: Kind(texts.TASKS, ((0, 0),), texts.make, texts.questions),
    "scene_text": _written(signs),
    "document": _written(documents),
    "chart": _written(charts),
}
KINDS = (CONVERSATION, *PAGES)
TASKS: dict[str, tuple[str, ...]] = {CONVERSATION: g.TASKS, **{name: kind.tasks for name, kind in PAGES.items()}}


def page(kind: str, split: str, index: int, size_px: tuple[int, int] | None = None) -> Page:
    """Page `index` of a split; its size follows from the index unless `size_px` (width, height) is given."""
    if split not in g.SPLITS:
        raise ValueError(f"split: expected one of {g.SPLITS}, got {split!r}")
    rule = PAGES[kind]
    width, height = size_px or rule.sizes[index % len(rule.sizes)]
    for attempt in range(10_000):
        content = rule.make(g.seeded(split, index, f"{kind} {width}x{height}", attempt), width, height)
        if g.split_of((kind, content)) == split:
            return Page(kind, split, index, width, height, content)
    raise RuntimeError("unreachable: one content in ten belongs to any split")


@dataclass(frozen=True)
class Example:
    """One page of any kind with everything that can be asked about it. `image` is None for text."""

    kind: str
    image: Image.Image | None
    questions: list[g.Question]
    caption: str | None
    request: str


def image(kind: str, split: str, index: int, size_px: tuple[int, int] | None = None) -> Image.Image:
    """The image of page `index`; ValueError for text, which has none."""
    if kind == CONVERSATION:
        return g.draw(g.scene(split, index, (size_px or (QWEN_SCENE_PX,))[0]))
    draw = PAGES[kind].draw
    if draw is None:
        raise ValueError(f"kind: {kind} has no images")
    return draw(page(kind, split, index, size_px))


def questions(kind: str, split: str, index: int, size_px: tuple[int, int] | None = None) -> list[g.Question]:
    """One question per task of page `index` (fewer where the page allows none)."""
    if kind == CONVERSATION:
        return g.questions(g.scene(split, index, (size_px or (QWEN_SCENE_PX,))[0]))
    found = page(kind, split, index, size_px)
    return PAGES[kind].questions(found, found.seed("questions"))


def example(kind: str, split: str, index: int, size_px: tuple[int, int] | None = None) -> Example:
    """Example `index` of a split."""
    drawn = None if kind == TEXT else image(kind, split, index, size_px)
    asked = questions(kind, split, index, size_px)
    if kind == CONVERSATION:
        s = g.scene(split, index, (size_px or (QWEN_SCENE_PX,))[0])
        return Example(kind, drawn, asked, g.caption(s, s.seed("caption")), CAPTION_REQUEST)
    found, caption = page(kind, split, index, size_px), PAGES[kind].caption
    return Example(kind, drawn, asked, caption(found, found.seed("caption")) if caption else None, READ_REQUEST)


def dense_labels(kind: str, split: str, index: int, size_px: tuple[int, int], token_px: int = QWEN_TOKEN_PX) -> Labels:
    """Shape, colour and word of every visual token of an image (raster order): see `pages.labels`."""
    if kind == CONVERSATION:
        s = g.scene(split, index, size_px[0])
        shape, color = g.patch_labels(s, token_px)
        return shape, color, np.full_like(shape, -1)
    found = page(kind, split, index, size_px)
    marks = PAGES[kind].marks
    assert marks is not None
    return labels(marks(found), found.width_px, found.height_px, token_px)
