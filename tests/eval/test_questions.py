from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from quota.core.errors import SampleError, UsageError
from quota.eval.questions import mixed_questions, questions_fingerprint, sample_questions, scene_questions, scene_tour
from quota.scenes import kinds as k
from quota.scenes.generate import TASKS


def test_balanced_fixed_and_one_picture_each() -> None:
    short, long = scene_questions(18, 168), scene_questions(36, 168)
    assert [q.id for q in long[:18]] == [q.id for q in short]
    assert (
        questions_fingerprint(short) == questions_fingerprint(scene_questions(18, 168)) != questions_fingerprint(long)
    )
    assert Counter(q.task for q in long) == dict.fromkeys(TASKS, 6)
    assert len({q.id.rsplit("-", 1)[0] for q in long}) == 36
    assert all(q.id.startswith("test-") for q in long)
    assert short[0].open_image().size == (168, 168)


def test_blind_questions_are_other_questions() -> None:
    asked = scene_questions(6, 168)
    assert questions_fingerprint(asked) != questions_fingerprint([q.without_image() for q in asked])


def test_a_tour_asks_one_picture() -> None:
    tour = scene_tour(0, 168)
    assert tour[-1].task == "caption" and len(tour) >= 5
    assert len({q.id.rsplit("-", 1)[0] for q in tour}) == 1


def test_no_questions_is_an_error() -> None:
    with pytest.raises(UsageError, match="questions"):
        scene_questions(0)
    with pytest.raises(SampleError, match="no samples"):
        sample_questions([])


def test_samples_need_answers() -> None:
    sample = SimpleNamespace(id="a7", instruction="what?", answer=None, task=None, image_bytes=None)
    with pytest.raises(SampleError, match=r"'a7'.*answer"):
        sample_questions([sample])


def test_sample_pictures_are_part_of_the_fingerprint() -> None:
    def made(stored: bytes | None) -> str:
        sample = SimpleNamespace(
            id="a", instruction="?", answer="yes", task="t", image_bytes=stored, image=lambda: None
        )
        return questions_fingerprint(sample_questions([sample]))

    assert len({made(None), made(b"x"), made(b"y")}) == 3


def test_mixed_questions_are_balanced_and_of_the_test_split() -> None:
    asked = mixed_questions(90)
    assert [q.id for q in asked[:45]] == [q.id for q in mixed_questions(45)] and len({q.id for q in asked}) == 90
    by_kind = {kind: [q for q in asked if q.task.startswith(f"{kind}/")] for kind in k.KINDS}
    assert {len(v) for v in by_kind.values()} == {18}
    assert {q.task for q in asked} == {f"{kind}/{task}" for kind in k.KINDS for task in k.TASKS[kind]}
    assert all((q.open_image is None) == (kind == k.TEXT) for kind, qs in by_kind.items() for q in qs)
    assert by_kind["chart"][0].open_image().size == k.PAGES["chart"].sizes[0]
