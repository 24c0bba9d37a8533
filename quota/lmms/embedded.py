"""The embedded benchmark as lmms-eval tasks: `quota_scenes` (six kinds of question, for LLaVA) and `quota_pages` (five
kinds of page, for Qwen2.5-VL).

The task files hold questions and answers; images are drawn when they are asked for, so everything works offline. The
questions are those of
`quota eval`: `python -m quota.lmms.embedded` writes them again.
"""

from __future__ import annotations

import json
from typing import Any

from PIL import Image

from quota.core.files import atomic_write_text
from quota.eval.questions import Question, mixed_questions, scene_questions
from quota.eval.score import is_right
from quota.lmms import TASKS
from quota.scenes import generate as g
from quota.scenes import kinds as k
from quota.scenes.vocabulary import IMAGE_SIZE


def scene_image(doc: dict[str, Any]) -> list[Image.Image]:
    return [g.draw(g.scene("test", doc["index"], IMAGE_SIZE))]


def page_image(doc: dict[str, Any]) -> list[Image.Image]:
    return [] if doc["kind"] == k.TEXT else [k.image(doc["kind"], "test", doc["index"])]


def instruction(doc: dict[str, Any]) -> str:
    return doc["instruction"]


def accuracy(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the answer's first words are right, as `quota eval` counts."""
    return {"accuracy": float(is_right(results[0], doc["answer"]))}


def rows(question: Question) -> dict[str, Any]:
    """A question as a line of a task file; `index` is the scene or page it is about."""
    kind, _, _ = question.task.partition("/")
    index = next(int(part) for part in question.id.split("-") if part.isdigit())
    return {
        "id": question.id,
        "kind": kind,
        "task": question.task,
        "index": index,
        "instruction": question.instruction,
        "answer": question.answer,
    }


def write() -> None:
    """All task data: 600 questions of each benchmark, one file per kind."""
    for name, questions in (("scenes", scene_questions()), ("pages", mixed_questions())):
        by_kind: dict[str, list[str]] = {}
        for row in map(rows, questions):
            by_kind.setdefault(row["kind"], []).append(json.dumps(row) + "\n")
        for kind, lines in by_kind.items():
            atomic_write_text(TASKS / "data" / f"{name}_{kind}.jsonl", "".join(lines))


if __name__ == "__main__":
    write()
