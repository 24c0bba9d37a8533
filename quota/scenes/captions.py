"""Captions of crowds and scenes in sentences, and how a caption is judged by what is really in the image.

A caption goes from quadrant to quadrant, and within one from left to right: "at the top left there are a large striped
red star and a small plain blue ring. at the bottom right there is a green sign that says taxi."
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from quota.scenes import generate as g
from quota.scenes.crowds import RADII_PX, TEXTURES, Crowd
from quota.scenes.vocabulary import COLORS, QUADRANTS, SHAPES, SIGN_WORDS


@dataclass(frozen=True)
class Mention:
    """One object as a caption names it: `words` says what it is ("large striped red star", "green sign taxi"), `place`
    its quadrant or "".
    """

    words: str
    place: str

    @property
    def core(self) -> str:
        """Colour and shape alone, or the sign without its colour's context: what must be in the image for the object
        not to be invented.
        """
        return " ".join(word for word in self.words.split() if word not in RADII_PX and word not in TEXTURES)


@dataclass(frozen=True)
class CaptionScore:
    """Counts over any number of captions. said, there: objects mentioned, objects in the images. right: mentions that
    agree with an object in all words and the place; exact: in all words. invented: mentions whose colour and shape no
    object of the image has.
    """

    said: int = 0
    there: int = 0
    right: int = 0
    exact: int = 0
    invented: int = 0

    def __add__(self, other: CaptionScore) -> CaptionScore:
        return CaptionScore(
            *(getattr(self, f) + getattr(other, f) for f in ("said", "there", "right", "exact", "invented"))
        )

    @property
    def precision(self) -> float:
        """Share of what is said that is right; 1 where nothing is said."""
        return self.right / self.said if self.said else 1.0

    @property
    def recall(self) -> float:
        """Share of what is there that is said rightly; 1 where nothing is there."""
        return self.right / self.there if self.there else 1.0

    @property
    def hallucination(self) -> float:
        """Share of what is said that is invented."""
        return self.invented / self.said if self.said else 0.0


def truth(image: Crowd | g.Scene) -> list[Mention]:
    """What a perfect caption of an image mentions, in its order."""
    return [Mention(words, place) for _, _, words, place in _placed(image)]


def _placed(image: Crowd | g.Scene) -> list[tuple[int, int, str, str]]:
    """(quadrant, x, words, place) of everything, in reading order."""
    things: list[tuple[Any, str, str]]
    if isinstance(image, Crowd):
        things = [(item, " ".join(item.kind), image.quadrant(item)) for item in image.items]
        things += [(sign, f"{sign.color} sign {sign.word}", image.quadrant(sign)) for sign in image.signs]
    else:
        things = [(thing, thing.name, thing.quadrant(image.size_px)) for thing in image.things]
    return sorted((QUADRANTS.index(place), thing.x, words, place) for thing, words, place in things)


def caption(image: Crowd | g.Scene) -> str:
    """The image in sentences, one per quadrant that holds anything."""
    said = []
    for place in QUADRANTS:
        names = [_phrase(m.words) for m in truth(image) if m.place == place]
        if names:
            listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
            said.append(f"at the {place} there {'is' if len(names) == 1 else 'are'} {listed}.")
    return " ".join(said)


def _phrase(words: str) -> str:
    article = "an" if words[0] in "aeiou" else "a"
    color, sign, word = words.partition(" sign ")
    return f"{article} {color} sign that says {word}" if sign else f"{article} {words}"


def _any(words: Iterable[str]) -> str:
    return "|".join(words)


_MENTION = re.compile(
    rf"(?P<place>{_any(QUADRANTS)})"
    rf"|(?P<object>(?:(?:{_any(RADII_PX)}) )?(?:(?:{_any(TEXTURES)}) )?(?:{_any(COLORS)}) (?:{_any(SHAPES)}))\b"
    rf"|(?P<plate>{_any(COLORS)}) sign (?:that says )?(?P<word>{_any(SIGN_WORDS)})\b"
)


def mentions(text: str) -> list[Mention]:
    """The objects and signs that a caption names, each at the quadrant last named before it; words it does not know are
    passed over.
    """
    found, place = [], ""
    for match in _MENTION.finditer(" ".join(text.lower().split())):
        if match["place"]:
            place = match["place"]
        else:
            found.append(Mention(match["object"] or f"{match['plate']} sign {match['word']}", place))
    return found


def score(text: str, there: Sequence[Mention]) -> CaptionScore:
    """One caption against what is in its image. An object said twice counts once as right."""
    said = mentions(text)
    cores = {mention.core for mention in there}
    right = sum((Counter(said) & Counter(there)).values())
    exact = sum((Counter(m.words for m in said) & Counter(m.words for m in there)).values())
    return CaptionScore(len(said), len(there), right, exact, sum(mention.core not in cores for mention in said))
