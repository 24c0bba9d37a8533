"""The scene generator: pure, splits apart, answers right."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from quota.scenes import generate as g
from quota.scenes.vocabulary import WORDS


@pytest.mark.parametrize("split", g.SPLITS)
def test_a_scene_is_a_pure_function_of_split_and_index(split: str) -> None:
    a, b = g.scene(split, 7, 168), g.scene(split, 7, 168)
    assert a == b
    assert g.split_of(a.things) == split
    assert np.array_equal(np.asarray(g.draw(a)), np.asarray(g.draw(b)))
    assert g.questions(a, 2) == g.questions(b, 2)


def test_splits_cannot_overlap() -> None:
    contents = {split: {g.scene(split, i, 168).things for i in range(60)} for split in g.SPLITS}
    assert not contents["train"] & contents["test"]
    assert not contents["calibration"] & contents["test"]
    assert not contents["calibration"] & contents["train"]


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="split"):
        g.scene("validation", 0)


def test_answers_follow_from_the_scene() -> None:
    seen: Counter[str] = Counter()
    yes: Counter[str] = Counter()
    for index in range(120):
        s = g.scene("test", index, 336)
        names = {t.name: t for t in s.things}
        for q in g.questions(s):
            seen[q.task] += 1
            yes[q.task] += q.answer == "yes"
            words = q.text.split()
            if q.task == "existence":
                assert (q.answer == "yes") == (" ".join(words[2:4]) in names)
            elif q.task == "position":
                assert q.answer == names[" ".join(words[3:5])].quadrant(336)
            elif q.task == "relation":
                a, b = names[" ".join(words[2:4])], names[" ".join(words[-3:-1])]
                assert (q.answer == "yes") == (a.x < b.x if "left" in words else a.y < b.y)
            elif q.task == "choice":
                letters = dict(zip(words[words.index("?") + 1 :: 3], words[words.index("?") + 3 :: 3], strict=False))
                assert [t.color for t in s.things if t.shape == words[4]] == [letters[q.answer]]
    assert all(seen[task] > 60 for task in g.TASKS)
    assert 0.3 < yes["existence"] / seen["existence"] < 0.7
    assert 0.3 < yes["relation"] / seen["relation"] < 0.7


def test_every_word_is_in_the_vocabulary() -> None:
    known = set(WORDS)
    for index in range(40):
        s = g.scene("train", index, 168)
        for q in g.questions(s):
            assert set(q.text.split()) <= known and set(q.answer.split()) <= known
        assert set(g.caption(s, s.seed("caption")).split()) <= known


def test_patch_labels_match_the_picture_grid() -> None:
    shape, color = g.patch_labels(g.scene("train", 0, 168))
    assert shape.shape == color.shape == (144,)
    assert (shape >= 0).any() and ((shape >= 0) == (color >= 0)).all()
