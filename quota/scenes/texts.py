"""Text only: a few statements and a question about them; no picture."""

from __future__ import annotations

import numpy as np

from quota.scenes.generate import Question
from quota.scenes.pages import Page
from quota.scenes.vocabulary import COLORS, COLUMNS, ITEMS, NUMBERS, SHAPES

TASKS = ("fact", "order", "sum", "larger")
_Fact = tuple[str, str, int]  # item, column, value


def make(
    rng: np.random.Generator, width_px: int, height_px: int
) -> tuple[tuple[_Fact, ...], tuple[str, ...], tuple[int, int]]:
    """(facts about distinct items, two objects and how they stand, two numbers whose sum is at most nine)."""
    column = COLUMNS[int(rng.integers(len(COLUMNS)))]
    facts = tuple(
        (ITEMS[i], column, int(rng.integers(10))) for i in rng.permutation(len(ITEMS))[: int(rng.integers(2, 5))]
    )
    colors, shapes = (rng.permutation(len(names))[:2] for names in (COLORS, SHAPES))
    objects = tuple(f"{tuple(COLORS)[c]} {SHAPES[s]}" for c, s in zip(colors, shapes, strict=True))
    a = int(rng.integers(0, 10))
    b = int(rng.integers(0, 10 - a))
    return facts, (*objects, ("above", "below", "left of", "right of")[int(rng.integers(4))]), (a, b)


_OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def questions(page: Page, rng: np.random.Generator) -> list[Question]:
    """One question per task, each with its own statements; yes and no equally likely."""
    facts, (first, second, way), (a, b) = page.content
    item, column, value = facts[int(rng.integers(len(facts)))]
    told = " , ".join(f"the {c} of {name} is {NUMBERS[v]}" for name, c, v in facts)
    turned, true = rng.random() < 0.5, rng.random() < 0.5
    subject, other = (second, first) if turned else (first, second)
    asked = way if turned != true else _OPPOSITE[way]
    x, y = (a, b) if a != b else (a, (a + 1) % 10)
    return [
        Question("fact", f"{told} . what is the {column} of {item} ?", NUMBERS[value]),
        Question(
            "order",
            f"the {first} is {way} the {second} . is the {subject} {asked} the {other} ?",
            "yes" if true else "no",
        ),
        Question("sum", f"what is {NUMBERS[a]} plus {NUMBERS[b]} ?", NUMBERS[a + b]),
        Question("larger", f"which is more , {NUMBERS[x]} or {NUMBERS[y]} ?", NUMBERS[max(x, y)]),
    ]
