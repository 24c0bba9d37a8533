"""Exact match and accuracies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from quota.eval.questions import Question

_WORD = re.compile(r"[a-z0-9]+")


def is_right(prediction: str, answer: str) -> bool:
    """True when the prediction's first words are the answer's words; case and punctuation do not count."""
    wanted = _WORD.findall(answer.lower())
    return bool(wanted) and _WORD.findall(prediction.lower())[: len(wanted)] == wanted


def by_task(questions: Sequence[Question], right: Sequence[bool]) -> dict[str, np.ndarray]:
    """task -> bool array of its questions in order; tasks in order of first appearance."""
    out: dict[str, list[bool]] = {}
    for q, r in zip(questions, right, strict=True):
        out.setdefault(q.task, []).append(bool(r))
    return {task: np.array(values) for task, values in out.items()}


def accuracies(right_by_task: dict[str, np.ndarray]) -> dict[str, float]:
    return {task: float(values.mean()) for task, values in right_by_task.items()}


def mean_accuracy(right_by_task: dict[str, np.ndarray]) -> float:
    """Mean over tasks, each task weighing the same."""
    return float(np.mean([values.mean() for values in right_by_task.values()]))


def majority_accuracy(questions: Iterable[Question]) -> dict[str, float]:
    """task -> accuracy of always giving that task's most frequent answer *in these questions*: the best any constant
    can do."""
    answers: dict[str, Counter[str]] = {}
    for q in questions:
        answers.setdefault(q.task, Counter())[q.answer.lower()] += 1
    return {task: counter.most_common(1)[0][1] / counter.total() for task, counter in answers.items()}
