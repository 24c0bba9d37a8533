"""The miniature mixed set: pure functions, disjoint splits, answers that follow from what is drawn, labels where the
words are."""

from __future__ import annotations

import numpy as np
import pytest

from quota.scenes import assets
from quota.scenes import generate as g
from quota.scenes import kinds as k
from quota.scenes.pages import WORD_CLASSES
from quota.scenes.vocabulary import NUMBERS, QWEN_TOKEN_PX, QWEN_WORDS, WORDS

PICTURED = ("scene_text", "document", "chart")


@pytest.mark.parametrize("kind", k.PAGES)
def test_splits_cannot_overlap(kind):
    found = {split: [k.page(kind, split, i) for i in range(40)] for split in g.SPLITS}
    for split, pages in found.items():
        assert all(g.split_of((kind, page.content)) == split for page in pages)
        assert [page.content for page in pages[:5]] == [k.page(kind, split, i).content for i in range(5)]
    contents = [{page.content for page in pages} for pages in found.values()]
    assert not (contents[0] & contents[1] or contents[0] & contents[2] or contents[1] & contents[2])


@pytest.mark.parametrize("kind", PICTURED)
def test_pictures_are_the_same_every_time_and_of_several_shapes(kind):
    first, again = k.image(kind, "test", 3), k.image(kind, "test", 3)
    assert np.array_equal(np.asarray(first), np.asarray(again))
    sizes = {k.image(kind, "test", i).size for i in range(4)}
    assert len(sizes) == 4 and all(w % QWEN_TOKEN_PX == 0 and h % QWEN_TOKEN_PX == 0 for w, h in sizes)


def test_every_word_is_known():
    for kind in k.KINDS:
        for i in range(25):
            example = k.example(kind, "train", i)
            texts = [example.caption or "", *(f"{q.text} {q.answer}" for q in example.questions)]
            assert {word for text in texts for word in text.split()} <= set(QWEN_WORDS)
            assert {q.task for q in example.questions} <= set(k.TASKS[kind])
    assert len(set(QWEN_WORDS)) == len(QWEN_WORDS)
    assert WORDS[:5] == (
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "<image>",
    )  # the first model's ids stay what its checkpoint was trained with


def by_task(kind, index):
    return {q.task: q for q in k.questions(kind, "train", index)}


def test_answers_follow_from_the_content():
    for i in range(30):
        columns, rows = k.page("document", "train", i).content
        asked = by_task("document", i)
        words = asked["cell"].text.split()
        value = dict(rows)[words[5]][columns.index(words[3])]
        assert asked["cell"].answer == NUMBERS[value] and asked["row_count"].answer == NUMBERS[len(rows)]
        bars = {name: (color, value) for name, color, value in k.page("chart", "train", i).content}
        asked = by_task("chart", i)
        best = (max if "highest" in asked["bar_extreme"].text else min)(bars, key=lambda name: bars[name][1])
        assert asked["bar_extreme"].answer == best
        words = asked["bar_compare"].text.split()
        assert asked["bar_compare"].answer == ("yes" if bars[words[1]][1] > bars[words[4]][1] else "no")
        signs = {color: word for word, color, _, _ in k.page("scene_text", "train", i).content}
        asked = by_task("scene_text", i)
        assert signs[asked["sign_word"].text.split()[5]] == asked["sign_word"].answer
        asked = by_task("text", i)
        said, question = asked["fact"].text.split(" . ")
        _, _, _, column, _, item, _ = question.split()
        assert f"the {column} of {item} is {asked['fact'].answer}" in said


def test_yes_and_no_are_balanced():
    for kind, task in (("chart", "bar_compare"), ("scene_text", "word_there"), ("text", "order")):
        answers = [by_task(kind, i)[task].answer for i in range(200)]
        assert 70 < answers.count("yes") < 130, (kind, answers.count("yes"))


def test_order_questions_are_right():
    """The first is above the second: then the second is below the first, and nothing else holds."""
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    for i in range(60):
        told, asked = by_task("text", i)["order"].text.removesuffix(" ?").split(" . is the ")
        way = next(w for w in opposite if f" {w} " in told)
        first, second = (part.strip() for part in told.removeprefix("the ").split(f" is {way} the "))
        said = next(w for w in opposite if f" {w} the " in asked)
        subject, other = asked.split(f" {said} the ")
        assert {subject, other} == {first, second}
        true = said == (way if subject == first else opposite[way])
        assert by_task("text", i)["order"].answer == ("yes" if true else "no")


@pytest.mark.parametrize("kind", PICTURED)
def test_every_drawn_word_labels_a_token(kind):
    """Dense supervision misses none of the words a page shows, and marks nothing a page does not show."""
    for i in range(12):
        page = k.page(kind, "train", i)
        size = (page.width_px, page.height_px)
        _, color, word = k.dense_labels(kind, "train", i, size)
        assert len(word) == page.width_px * page.height_px // QWEN_TOKEN_PX**2
        shown = {
            mark.word if mark.word is None or not mark.word.isdigit() else NUMBERS[int(mark.word)]
            for mark in k.PAGES[kind].marks(page)
        } - {None}
        assert {WORD_CLASSES[n] for n in word[word >= 0]} == shown
        if kind == "chart":
            assert (color >= 0).any()


def test_mixed_calibration_folder(tmp_path):
    from quota.calib.samples import Samples

    path = assets.write_calibration(tmp_path / "mixed", 15, family="qwen2_5_vl")
    samples = Samples.load(path)
    assert [sample.task for sample in samples][:5] == list(k.KINDS)
    assert all((sample.image_bytes is None) == (sample.task == k.TEXT) for sample in samples)
    assert len({sample.image().size for sample in samples if sample.image_bytes}) >= 4
    assert samples[0].id == "calibration-000" and samples[10].instruction != samples[0].instruction
