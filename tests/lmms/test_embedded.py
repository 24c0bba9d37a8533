"""The shipped tasks ask what `quota eval` asks, and get the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from quota.eval.generation import answers
from quota.eval.questions import Question, mixed_questions, scene_questions
from quota.lmms import TASKS, embedded
from quota.lmms.model import Quota
from quota.runtime.load import load_model
from quota.scenes import generate as g
from quota.scenes import kinds as k

Asked = Callable[[Any, list[str], int], dict[str, list[str]]]


def shipped(name: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted((TASKS / "data").glob(f"{name}_*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def test_the_files_hold_the_questions_of_quota_eval() -> None:
    """All 600 ids; the first 60 whole (drawing up the others takes a while)."""
    for name, made in (("scenes", scene_questions(60)), ("pages", mixed_questions(60))):
        rows = {row["id"]: row for row in shipped(name)}
        assert len(rows) == 600
        for question in made:
            assert rows[question.id] == embedded.rows(question)


def test_groups_name_every_kind() -> None:
    for group, kinds in (("scenes", g.TASKS), ("pages", k.KINDS)):
        named = yaml.safe_load((TASKS / f"quota_{group}.yaml").read_text())["task"]
        assert sorted(named) == sorted(f"quota_{group}_{kind}" for kind in kinds)
        assert sorted(path.stem for path in (TASKS / "data").glob(f"{group}_*")) == sorted(
            f"{group}_{kind}" for kind in kinds
        )


def of_kind(questions: list[Question], kind: str, n: int) -> list[Question]:
    return [q for q in questions if q.task.partition("/")[0] == kind][:n]


def test_answers_equal_those_of_quota_eval(llava_folder: Path, ask: Asked) -> None:
    texts = ask(Quota(pretrained=str(llava_folder), batch_size=2), ["quota_scenes"], 2)
    model, processor = load_model(llava_folder)
    asked = scene_questions(12)
    for kind in g.TASKS:
        assert texts[f"quota_scenes_{kind}"] == answers(model, processor, of_kind(asked, kind, 2), 6)


def test_pages_of_all_kinds_one_without_pictures(tmp_path: Path, ask: Asked) -> None:
    from quota.scenes.qwen_model import build_config, build_model, build_processor

    build_model(build_config(192, 2)).save_pretrained(tmp_path)
    build_processor().save_pretrained(tmp_path)
    made = Quota(pretrained=str(tmp_path), batch_size=2)
    texts = ask(made, ["quota_pages"], 1)
    model, processor = load_model(tmp_path)
    asked = mixed_questions(5)
    for kind in k.KINDS:
        assert texts[f"quota_pages_{kind}"] == answers(model, processor, of_kind(asked, kind, 1), 6)
    seen = {task: row["visual_tokens"] for (task, _), row in made.records().items()}
    assert seen["quota_pages_text"] == 0 and seen["quota_pages_conversation"] == 256
