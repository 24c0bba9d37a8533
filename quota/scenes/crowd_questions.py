"""What is asked about crowds. Every answer follows from what is drawn; the objects that a question names are told from
all others by that name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from quota.scenes.crowds import ATTRIBUTES, RADII_PX, TEXTURES, Change, Crowd, Item, Sign
from quota.scenes.generate import Question
from quota.scenes.vocabulary import COLORS, LETTERS, NUMBERS, SHAPES, SIGN_WORDS

_CLASSES: dict[str, tuple[str, ...]] = {
    "size": tuple(RADII_PX),
    "texture": TEXTURES,
    "color": tuple(COLORS),
    "shape": SHAPES,
}
_FARTHEST = {"left": ("x", -1), "right": ("x", 1), "up": ("y", -1), "down": ("y", 1)}
_GAP_PX = 20  # by which a position has to differ before anything is asked about it
_NEARER = 1.3  # how much farther away the second nearest object is
CHANGE_REQUEST = "what changed from the first picture to the second?"


@dataclass(frozen=True)
class Dialogue:
    """Questions in turn, each with its answer; a later one cannot be understood without the ones before. `task` is the
    last one's.
    """

    turns: tuple[Question, ...]

    @property
    def task(self) -> str:
        return self.turns[-1].task


def questions(c: Crowd, per_task: int = 1, rng: np.random.Generator | None = None) -> list[Dialogue]:
    """`per_task` of each of TASKS, fewer where the crowd allows none; yes and no equally likely."""
    rng = rng or c.seed("questions")
    out: list[Dialogue] = []
    for maker in MAKERS.values():
        made = [maker(c, rng) for _ in range(per_task)]
        out.extend(
            dict.fromkeys(found if isinstance(found, Dialogue) else Dialogue((found,)) for found in made if found)
        )
    return out


def _pick(rng: np.random.Generator, options: list[Any]) -> Any:
    return options[int(rng.integers(len(options)))] if options else None


def _existence(c: Crowd, rng: np.random.Generator) -> Question | None:
    """An object named by size, texture, colour and shape; a "no" differs from an object that is there in one of
    them."""
    there = {item.kind for item in c.items}
    kind, answer = sorted(there)[int(rng.integers(len(there)))], "yes"
    if rng.random() < 0.5:
        near = [(*kind[:at], word, *kind[at + 1 :]) for at, name in enumerate(ATTRIBUTES) for word in _CLASSES[name]]
        found = _pick(rng, [other for other in near if other not in there])
        if found is None:
            return None
        kind, answer = found, "no"
    return Question("existence", f"is there a {' '.join(kind)}?", answer)


def _attribute(asked: str, ask: Callable[[str], str]) -> Callable[[Crowd, np.random.Generator], Question | None]:
    others = tuple(name for name in ATTRIBUTES if name != asked)

    def make(c: Crowd, rng: np.random.Generator) -> Question | None:
        """One attribute of an object that two or three of the others single out."""
        options = []
        for item in c.items:
            for used in (others[1:], others[:1] + others[2:], others[:2], others):
                words = [getattr(item, name) for name in used]
                if sum(words == [getattr(o, name) for name in used] for o in c.items) == 1:
                    options.append((" ".join(words) + ("" if "shape" in used else " object"), item))
                    break
        found = _pick(rng, options)
        return found and Question(asked, ask(found[0]), getattr(found[1], asked))

    return make


def _counting(c: Crowd, rng: np.random.Generator) -> Question:
    """Objects with one or two attributes in common among others that share one of them; each count that occurs equally
    likely.
    """
    first, second = (ATTRIBUTES[i] for i in sorted(rng.permutation(len(ATTRIBUTES))[:2]))
    used = (first, second) if rng.random() < 0.6 else (second,)
    have = Counter(tuple(getattr(item, name) for name in used) for item in c.items)
    by_count: dict[int, list[tuple[str, ...]]] = {}
    for words in product(*(_CLASSES[name] for name in used)):
        by_count.setdefault(have[words], []).append(words)
    n = sorted(k for k in by_count if k < len(NUMBERS))
    count = n[int(rng.integers(len(n)))]
    asked = by_count[count][int(rng.integers(len(by_count[count])))]
    return Question("counting", f"how many {' '.join(asked)} objects are there?", NUMBERS[count])


def _three(c: Crowd, rng: np.random.Generator) -> list[Item]:
    return [c.items[int(i)] for i in rng.permutation(len(c.items))[:3]]


def _extreme(c: Crowd, rng: np.random.Generator) -> Question | None:
    """Which of three objects is farthest to one side."""
    for _ in range(20):
        way = tuple(_FARTHEST)[int(rng.integers(4))]
        axis, sign = _FARTHEST[way]
        three = _three(c, rng)
        best, second = sorted(three, key=lambda item: -sign * getattr(item, axis))[:2]
        if abs(getattr(best, axis) - getattr(second, axis)) >= _GAP_PX:
            a, b, last = (f"the {c.names[item]}" for item in three)
            return Question("extreme", f"which is farthest {way}: {a}, {b} or {last}?", c.names[best])
    return None


def _relation(c: Crowd, rng: np.random.Generator) -> Question | None:
    """One object against two others; a "no" is wrong about one of the two."""
    wanted = rng.random() < 0.5
    for _ in range(40):
        a, b, d = _three(c, rng)
        if abs(a.x - b.x) < _GAP_PX or abs(a.y - d.y) < _GAP_PX:
            continue
        across, down = a.x < b.x, a.y < d.y
        if not wanted:
            across, down = (not across, down) if rng.random() < 0.5 else (across, not down)
        beside, over = "left of" if across else "right of", "above" if down else "below"
        names = [c.names[item] for item in (a, b, d)]
        text = f"is the {names[0]} {beside} the {names[1]} and {over} the {names[2]}?"
        return Question("relation", text, "yes" if wanted else "no")
    return None


def _nearest_to(c: Crowd, thing: Item | Sign) -> Item | None:
    """The object nearest to an object or sign; None where another is almost as near."""
    first, second = sorted(
        (math.hypot(item.x - thing.x, item.y - thing.y), i) for i, item in enumerate(c.items) if item is not thing
    )[:2]
    return c.items[first[1]] if second[0] >= _NEARER * first[0] else None


def _nearest(c: Crowd, rng: np.random.Generator) -> Question | None:
    pairs = [(item, near) for item in c.items if (near := _nearest_to(c, item))]
    found = _pick(rng, pairs)
    return found and Question("nearest", f"which object is nearest to the {c.names[found[0]]}?", c.names[found[1]])


def _position(c: Crowd, rng: np.random.Generator) -> Question:
    item = c.items[int(rng.integers(len(c.items)))]
    return Question("position", f"where is the {c.names[item]}?", c.quadrant(item))


def _reading(c: Crowd, rng: np.random.Generator) -> Question | None:
    """A sign's word, its colour or its neighbour; only where there is a sign."""
    sign = _pick(rng, list(c.signs))
    if sign is None:
        return None
    near = _nearest_to(c, sign)
    options = [
        Question("reading", f"what does the {sign.color} sign say?", sign.word),
        Question("reading", f"what color is the sign that says {sign.word}?", sign.color),
        Question("reading", f"where is the sign that says {sign.word}?", c.quadrant(sign)),
    ]
    if near:
        options.append(
            Question("reading", f"which object is nearest to the sign that says {sign.word}?", c.names[near])
        )
    return _pick(rng, options)


def _sign_there(c: Crowd, rng: np.random.Generator) -> Question | None:
    shown = [sign.word for sign in c.signs]
    word, answer = _pick(rng, shown), "yes"
    if word is None:
        return None
    if rng.random() < 0.5:
        word, answer = _pick(rng, [w for w in SIGN_WORDS if w not in shown]), "no"
    return Question("sign_there", f"is there a sign that says {word}?", answer)


def _choice(c: Crowd, rng: np.random.Generator) -> Question | None:
    """The colour of an object that texture and shape, or size and shape, single out, as a letter."""
    asked = _color(c, rng)
    if asked is None:
        return None
    others = [word for word in COLORS if word != asked.answer]
    options = [asked.answer, *(others[int(i)] for i in rng.permutation(len(others))[:3])]
    options = [options[int(i)] for i in rng.permutation(4)]
    listed = " ".join(f"{letter}. {word}" for letter, word in zip(LETTERS, options, strict=True))
    return Question("choice", f"{asked.text} {listed} answer with the letter.", LETTERS[options.index(asked.answer)])


def _follow_up(c: Crowd, rng: np.random.Generator) -> Dialogue | None:
    """The object nearest to another or farthest to a side of three, then two things about it that its name does not
    say.
    """
    first = (_nearest if rng.random() < 0.5 else _extreme)(c, rng)
    if first is None:
        return None
    item = next(item for item in c.items if c.names[item] == first.answer)
    open_to = [name for name in ("texture", "size") if getattr(item, name) not in c.names[item].split()]
    asks = {"texture": "what is its pattern?", "size": "is it small or large?"}
    later = [Question("follow_up", asks[name], getattr(item, name)) for name in open_to]
    later.append(Question("follow_up", "where is it?", c.quadrant(item)))
    order = [later[int(i)] for i in rng.permutation(len(later))]
    return Dialogue((first, *order[:2]))


_color = _attribute("color", lambda name: f"what color is the {name}?")
MAKERS: dict[str, Callable[[Crowd, np.random.Generator], Question | Dialogue | None]] = {
    "existence": _existence,
    "color": _color,
    "shape": _attribute("shape", lambda name: f"what shape is the {name}?"),
    "texture": _attribute("texture", lambda name: f"what is the pattern of the {name}?"),
    "size": _attribute("size", lambda name: f"is the {name} small or large?"),
    "counting": _counting,
    "extreme": _extreme,
    "relation": _relation,
    "nearest": _nearest,
    "position": _position,
    "reading": _reading,
    "sign_there": _sign_there,
    "choice": _choice,
    "follow_up": _follow_up,
}
TASKS = tuple(MAKERS)


def change_question(pair: Change) -> Question:
    """What is asked about two images: the whole sentence is the answer."""
    return Question("change", CHANGE_REQUEST, pair.said)
