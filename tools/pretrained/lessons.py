"""What is shown and asked: one `Lesson` per number, a pure function. All segments of a lesson share its images and see
nothing of each other.

The mix repeats every 20 lessons. A brief lesson is a description and a few questions; a full one is many questions, and
three in ten of them a description. Held-out lessons come from the generators' test split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quota.scenes import captions, crowd_questions, crowds
from quota.scenes import generate as g
from quota.scenes import kinds as k
from quota.scenes.pages import WORD_CLASSES
from quota.scenes.vocabulary import CAPTION_REQUEST, READ_REQUEST, SIGN_WORDS
from tools.pretrained.parts import IMAGE_MEAN, IMAGE_STD, PATCH_PX, SIZE_PX

Turns = tuple[tuple[str, str], ...]
SCENE, CROWD, CHANGE = "scene", "crowd", "change"
MIX = (
    CROWD,
    SCENE,
    "document",
    CROWD,
    CROWD,
    SCENE,
    "chart",
    CROWD,
    SCENE,
    CROWD,
    CHANGE,
    CROWD,
    SCENE,
    "scene_text",
    CROWD,
    "document",
    CROWD,
    SCENE,
    "chart",
    CROWD,
)
LABELS = (*crowds.ATTRIBUTES, "word")
CAPTION, READ = "caption", "read"
BRIEF = 6  # questions of a brief lesson


@dataclass(frozen=True)
class Segment:
    """Turns behind the images of a lesson. task: what the last answer is judged as."""

    task: str
    turns: Turns


@dataclass(frozen=True)
class Lesson:
    """images: one or two. segments: what is asked. labels: per patch of all images, see `crowds.patch_labels`."""

    kind: str
    images: tuple[Any, ...]
    segments: tuple[Segment, ...]
    labels: dict[str, np.ndarray]


def natural(text: str) -> str:
    """The generators' spaced words as people write them."""
    return re.sub(r" ([?.,])", r"\1", re.sub(r"\bis there (?=\w+ \w+ in)", "is there a ", text))


def _spaced_or_not(text: str, rng: np.random.Generator) -> str:
    return natural(text) if rng.random() < 0.5 else text


def lesson(split: str, number: int, *, brief: bool = False) -> Lesson:
    """Lesson `number` of a split. Those of the test split ask each task once."""
    kind = MIX[number % len(MIX)]
    rng = g.seeded(split, number, "lesson", 0)
    if kind == CHANGE:
        return _change(split, number)
    held_out = split == "test"
    described = not held_out and (rng.random() < 0.3 or brief)
    made = _whole(kind, split, number, rng, held_out)
    *asked, description = made.segments
    if brief:
        asked = [asked[i] for i in rng.permutation(len(asked))[:BRIEF]]
    return replace(made, segments=(*asked, description) if described else tuple(asked))


def whole_lesson(kind: str, split: str, number: int) -> Lesson:
    """Image `number` of one kind and split with one question of each task and its description."""
    return _whole(kind, split, number, g.seeded(split, number, f"whole {kind}", 0), True)


def _whole(kind: str, split: str, number: int, rng: np.random.Generator, once: bool) -> Lesson:
    """Everything asked, each task once or often; the description is the last segment."""
    return {CROWD: _crowd, SCENE: _scene}.get(kind, partial(_written, kind))(split, number, rng, once)


def _crowd(split: str, number: int, rng: np.random.Generator, once: bool) -> Lesson:
    c = crowds.crowd(split, number, SIZE_PX)
    asked = crowd_questions.questions(c, 1 if once else 2, rng)
    segments = [Segment(d.task, tuple((q.text, q.answer) for q in d.turns)) for d in asked]
    segments.append(Segment(CAPTION, ((natural(CAPTION_REQUEST), captions.caption(c)),)))
    return Lesson(CROWD, (crowds.draw(c),), tuple(segments), _crowd_labels(c))


def _crowd_labels(c: crowds.Crowd) -> dict[str, np.ndarray]:
    found = crowds.patch_labels(c, PATCH_PX)
    to_word = np.array([*(WORD_CLASSES.index(w) for w in SIGN_WORDS), -2, -1])  # -2 and -1 index from the end
    return {**found, "word": to_word[found["word"]]}


def _scene(split: str, number: int, rng: np.random.Generator, once: bool) -> Lesson:
    s = g.scene(split, number, SIZE_PX)
    asked = g.questions(s, 1 if once else 3, rng)
    segments = [Segment(q.task, ((_spaced_or_not(q.text, rng), q.answer),)) for q in asked]
    segments.append(Segment(CAPTION, ((_spaced_or_not(CAPTION_REQUEST, rng), captions.caption(s)),)))
    shape, color = g.patch_labels(s, PATCH_PX)
    nothing = np.full_like(shape, -1)
    labels = {"size": nothing, "texture": nothing, "color": color, "shape": shape, "word": nothing}
    return Lesson(SCENE, (g.draw(s),), tuple(segments), labels)


def _written(kind: str, split: str, number: int, rng: np.random.Generator, once: bool) -> Lesson:
    size = (SIZE_PX, SIZE_PX)
    page, rule = k.page(kind, split, number, size), k.PAGES[kind]
    assert rule.caption is not None
    asked = dict.fromkeys(q for _ in range(1 if once else 5) for q in rule.questions(page, rng))
    segments = [Segment(q.task, ((_spaced_or_not(q.text, rng), q.answer),)) for q in asked]
    segments.append(Segment(READ, ((_spaced_or_not(READ_REQUEST, rng), natural(rule.caption(page, rng))),)))
    shape, color, word = k.dense_labels(kind, split, number, size, PATCH_PX)
    labels = {"size": shape, "texture": shape, "color": color, "shape": shape, "word": word}
    return Lesson(kind, (k.image(kind, split, number, size),), tuple(segments), labels)


def _change(split: str, number: int) -> Lesson:
    pair = crowds.change(split, number, SIZE_PX)
    asked = crowd_questions.change_question(pair)
    labels = [_crowd_labels(c) for c in (pair.before, pair.after)]
    return Lesson(
        CHANGE,
        (crowds.draw(pair.before), crowds.draw(pair.after)),
        (Segment(asked.task, ((asked.text, asked.answer),)),),
        {name: np.concatenate([one[name] for one in labels]) for name in LABELS},
    )


def pixels(images: tuple[Any, ...]) -> Tensor:
    """PIL images -> float32 [N, 3, 336, 336] as the processor gives them."""
    stacked = (
        torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in images]).permute(0, 3, 1, 2).float() / 255
    )
    return (stacked - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)


@dataclass(frozen=True)
class Packed:
    """The segments of a lesson in a row: ids and labels int64 [T] (-100 where nothing is learned), number of the
    segment from 1 on, position after the images, and whether the token belongs to a description."""

    ids: Tensor
    labels: Tensor
    segment: Tensor
    position: Tensor
    described: Tensor

    def blocks(self, longest: int = 160) -> list[tuple[int, int]]:
        """(first, end) of runs of whole segments, of `longest` tokens at most where no segment is longer."""
        ends = [*(self.segment.diff().nonzero().flatten() + 1).tolist(), len(self.segment)]
        found, begin = [], 0
        for at, end in enumerate(ends):
            if at + 1 == len(ends) or ends[at + 1] - begin > longest:
                found.append((begin, end))
                begin = end
        return found


class Prompts:
    """SmolLM2's chat in token ids: `<|im_start|>user\\n` images, a newline after each, question, answer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.before, self.newline = self._ids("<|im_start|>user\n"), self._ids("\n")

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def text(self, ids: list[int]) -> str:
        """Token ids as text."""
        return str(self._tokenizer.decode(ids))

    def _turns(self, turns: Turns) -> Iterator[tuple[list[int], bool]]:
        for number, (asked, answer) in enumerate(turns):
            opening = "\n" if number == 0 else "\n<|im_start|>user\n"
            yield self._ids(f"{opening}{asked}<|im_end|>\n<|im_start|>assistant\n"), False
            yield self._ids(f"{answer}<|im_end|>"), True

    def pack(self, segments: tuple[Segment, ...]) -> Packed:
        """All segments of a lesson; positions count from 0."""
        rows: list[tuple[int, int, int, int, bool]] = []
        for number, segment in enumerate(segments, 1):
            at, said = 0, segment.task in (CAPTION, READ)
            for ids, learned in self._turns(segment.turns):
                rows += [(t, t if learned else -100, number, at + i, said) for i, t in enumerate(ids)]
                at += len(ids)
        return Packed(*(torch.tensor(column) for column in zip(*rows, strict=True)))
