from __future__ import annotations

import numpy as np
import pytest

from quota.eval.questions import Question
from quota.eval.score import accuracies, by_task, is_right, majority_accuracy, mean_accuracy


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("red", "red", True),
        ("Red.", "red", True),
        ("red and blue", "red", True),
        ("top left corner", "top left", True),
        ("top right", "top left", False),
        ("reddish", "red", False),
        ("", "red", False),
        ("the red", "red", False),
        ("b . blue", "b", True),
        ("YES, there is", "yes", True),
        ("red", "", False),
    ],
)
def test_first_words_decide(prediction: str, answer: str, right: bool) -> None:
    assert is_right(prediction, answer) is right


def _questions() -> list[Question]:
    return [
        Question(str(i), task, "?", answer, None)
        for i, (task, answer) in enumerate([("a", "yes"), ("b", "one"), ("a", "yes"), ("a", "No"), ("b", "two")])
    ]


def test_accuracy_weighs_tasks_equally() -> None:
    right = by_task(_questions(), [True, False, True, False, True])
    assert list(right) == ["a", "b"]
    assert accuracies(right) == {"a": pytest.approx(2 / 3), "b": 0.5}
    assert mean_accuracy(right) == pytest.approx((2 / 3 + 0.5) / 2)
    assert np.array_equal(right["a"], [True, True, False])


def test_majority_is_the_best_constant() -> None:
    assert majority_accuracy(_questions()) == {"a": pytest.approx(2 / 3), "b": 0.5}
