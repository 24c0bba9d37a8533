"""What is asked: held-out questions of the scene generator, or a samples file with answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count as count_from
from typing import Any

from PIL.Image import Image

from quota.core.errors import SampleError, UsageError
from quota.scenes import generate as g
from quota.scenes import kinds as k
from quota.scenes.vocabulary import CAPTION_REQUEST, IMAGE_SIZE

DEFAULT_QUESTIONS = 600


@dataclass(frozen=True)
class Question:
    """One question with its answer. `open_image` draws or reads the image when it is needed; None is a text-only
    question.

    `image`: names the image's content where the id does not.
    """

    id: str
    task: str
    instruction: str
    answer: str
    open_image: Callable[[], Image] | None
    image: str = ""

    def without_image(self) -> Question:
        return Question(self.id, self.task, self.instruction, self.answer, None)


_image = lru_cache(maxsize=700)(g.draw)  # 336 px: 0.34 MB each; the rows of one run share the images


def scene_questions(number: int = DEFAULT_QUESTIONS, size_px: int = IMAGE_SIZE) -> list[Question]:
    """`number` questions of the test split, balanced over the tasks: always the same list, a longer one starts with a
    shorter one.

    Every question has its own image, so questions are independent draws (what the bootstrap over questions assumes).
    """
    if number < 1:
        raise UsageError(f"questions: expected at least 1, got {number}")
    out: list[Question] = []
    for index in count_from():
        if len(out) == number:
            break
        task = g.TASKS[len(out) % len(g.TASKS)]
        scene = g.scene("test", index, size_px)
        asked = next((q for q in g.questions(scene) if q.task == task), None)
        if asked is None:  # this image allows no question of this task: take the next image
            continue
        out.append(Question(f"test-{index:05d}-{task}", task, asked.text, asked.answer, partial(_image, scene)))
    return out


def mixed_questions(number: int = DEFAULT_QUESTIONS) -> list[Question]:
    """`number` questions over the test split of all five kinds, balanced over the kinds and inside each over its tasks;
    tasks are named `kind/task`.

    Always the same list, a longer one starts with a shorter one; every question has its own page.
    """
    if number < 1:
        raise UsageError(f"questions: expected at least 1, got {number}")
    out: list[Question] = []
    seen = dict.fromkeys(k.KINDS, 0)
    asked = dict.fromkeys(k.KINDS, 0)
    while len(out) < number:
        kind = k.KINDS[len(out) % len(k.KINDS)]
        task = k.TASKS[kind][asked[kind] % len(k.TASKS[kind])]
        index, seen[kind] = seen[kind], seen[kind] + 1
        found = next((q for q in k.questions(kind, "test", index) if q.task == task), None)
        if found is None:  # this page allows no question of this task: take the next page
            continue
        asked[kind] += 1
        opener = None if kind == k.TEXT else partial(_page_image, kind, index)
        out.append(Question(f"test-{kind}-{index:05d}-{task}", f"{kind}/{task}", found.text, found.answer, opener))
    return out


@lru_cache(maxsize=700)
def _page_image(kind: str, index: int) -> Image:
    return k.image(kind, "test", index)


def scene_tour(index: int = 0, size_px: int = IMAGE_SIZE) -> list[Question]:
    """One question per task about one test image, and the request for its caption; for side-by-side answers."""
    s = g.scene("test", index, size_px)
    opener = partial(_image, s)
    tour = [Question(f"test-{index:05d}-{q.task}", q.task, q.text, q.answer, opener) for q in g.questions(s)]
    text = g.caption(s, s.seed("caption"))
    return [*tour, Question(f"test-{index:05d}-caption", "caption", CAPTION_REQUEST, text, opener)]


def sample_questions(samples: Iterable[Any]) -> list[Question]:
    """Questions from `quota.calib.samples`; every sample needs an `answer`. `task` is optional (one task "all")."""
    out = []
    for sample in samples:
        if not sample.answer:
            raise SampleError(
                f"sample {sample.id!r}: field 'answer' is missing; evaluation needs an answer for every sample"
            )
        stored = sample.image_bytes
        name = hashlib.sha256(stored).hexdigest() if stored else ""
        out.append(
            Question(
                sample.id,
                sample.task or "all",
                sample.instruction,
                sample.answer,
                sample.image if stored else None,
                name,
            )
        )
    if not out:
        raise SampleError("samples: the file holds no samples; expected at least one")
    return out


def questions_fingerprint(questions: Iterable[Question]) -> str:
    """sha256 over ids, instructions and answers, in order (the ids of generated questions name their images)."""
    digest = hashlib.sha256()
    for q in questions:
        digest.update(
            f"{q.id}\0{q.task}\0{q.instruction}\0{q.answer}\0{q.open_image is not None}\0{q.image}\n".encode()
        )
    return "sha256:" + digest.hexdigest()


def chunks(questions: list[Question], size: int) -> Iterator[list[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]
