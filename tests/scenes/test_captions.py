"""Captions: what a perfect one says, and how others are judged."""

from __future__ import annotations

import pytest

from quota.scenes import captions, crowds
from quota.scenes import generate as g
from quota.scenes.captions import CaptionScore, Mention


@pytest.mark.parametrize("index", range(8))
def test_the_true_caption_is_perfect(index):
    for picture in (crowds.crowd("test", index), g.scene("test", index)):
        there, text = captions.truth(picture), captions.caption(picture)
        assert captions.mentions(text) == there
        found = captions.score(text, there)
        assert found == CaptionScore(len(there), len(there), len(there), len(there), 0)
        assert (found.precision, found.recall, found.hallucination) == (1.0, 1.0, 0.0)


def test_sentences():
    items = tuple(
        crowds.Item(*words.split(), x, y, 12)
        for words, x, y in (
            ("small plain orange star", 90, 40),
            ("large dotted red ring", 40, 60),
            ("small checked blue heart", 300, 300),
        )
    )
    c = crowds.Crowd("train", 0, 336, items, (crowds.Sign("taxi", "orange", 60, 300),))
    assert captions.caption(c) == (
        "at the top left there are a large dotted red ring and a small plain orange star. "
        "at the bottom left there is an orange sign that says taxi. "
        "at the bottom right there is a small checked blue heart."
    )


THERE = [
    Mention("small plain red star", "top left"),
    Mention("large dotted blue ring", "top left"),
    Mention("green sign taxi", "bottom right"),
]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", CaptionScore(0, 3, 0, 0, 0)),
        ("nothing that is known", CaptionScore(0, 3, 0, 0, 0)),
        ("At the top left there is a small plain red star.", CaptionScore(1, 3, 1, 1, 0)),
        ("a small plain red star at the top left", CaptionScore(1, 3, 0, 1, 0)),  # a place counts from where it is said
        ("at the top right there is a small plain red star", CaptionScore(1, 3, 0, 1, 0)),  # wrong place
        (
            "at the top left there is a large plain red star",
            CaptionScore(1, 3, 0, 0, 0),
        ),  # wrong size: there, but not as said
        ("at the top left there is a small plain red ring", CaptionScore(1, 3, 0, 0, 1)),  # no red ring at all
        (
            "at the top left there are a small plain red star and a small plain red star",
            CaptionScore(2, 3, 1, 1, 0),
        ),  # said twice
        ("at the bottom right there is a green sign that says taxi", CaptionScore(1, 3, 1, 1, 0)),
        ("at the bottom right there is a green sign that says bank", CaptionScore(1, 3, 0, 0, 1)),
        ("at the top left there is a red star", CaptionScore(1, 3, 0, 0, 0)),
    ],
)
def test_captions_against_the_truth(text, wanted):
    assert captions.score(text, THERE) == wanted


def test_scores_add_up():
    total = captions.score("at the top left a small plain red star", THERE) + captions.score("a black star", THERE)
    assert (total.said, total.there) == (2, 6)
    assert (total.precision, total.recall, total.hallucination) == (0.5, 1 / 6, 0.5)
    empty = CaptionScore()
    assert (empty.precision, empty.recall, empty.hallucination) == (1.0, 1.0, 0.0)
