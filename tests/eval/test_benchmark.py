from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quota.eval.answering import AnswerFile, Row, answer_together
from quota.eval.benchmark import Answered, RowSpec, Settings, summarise
from quota.eval.generation import Cost
from quota.eval.questions import Question, scene_questions
from quota.eval.remarks import remarks
from quota.eval.results import Evaluation


def _questions(n: int) -> list[Question]:
    return [Question(f"q{i}", "ab"[i % 2], "?", "yes", None) for i in range(n)]


def _spec(name: str) -> RowSpec:
    return RowSpec(name, "weights", None, name, 1000, "float32", name, None, lambda: (None, None))


def test_answers_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path, questions = tmp_path / "answers.jsonl", _questions(6)
    AnswerFile(path, "key").add(questions[:4], ["yes", "no", "yes", "yes"])
    whole = path.read_text()
    path.write_text(whole + '{"id": "q4", "pred')
    again = AnswerFile(path, "key")
    assert again.known == {"q0": "yes", "q1": "no", "q2": "yes", "q3": "yes"}
    assert path.read_text() == whole
    again.add(questions[4:], ["no", "no"])
    assert len(AnswerFile(path, "key").known) == 6
    assert [json.loads(line)["right"] for line in path.read_text().splitlines()[1:]] == [
        True,
        False,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "content",
    ["", "not json\n", '{"schema": "quota-answers/1", "key": "other"}\n{"id": "q0", "prediction": "x"}\n', '{"schema"'],
)
def test_files_of_another_key_are_not_reused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    assert AnswerFile(path, "key").known == {}
    assert json.loads(path.read_text())["key"] == "key"


def test_resuming_answers_like_an_unbroken_run(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    questions, file = scene_questions(5, 168), AnswerFile(tmp_path / "a.jsonl", "k")
    assert answer_together(lambda: tiny, [Row(None, file)], questions, 2, 2) > 0
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(lines[:4]))  # header, one batch, and one answer of the next
    counted: list[int] = []
    resumed = Row(None, AnswerFile(tmp_path / "b.jsonl", "k"), counted.append)
    answer_together(lambda: tiny, [resumed], questions, 2, 2)
    assert resumed.file.known == file.known and len(file.known) == 5 and sum(counted) == 5


def test_a_finished_row_does_not_open_its_model(tmp_path: Path) -> None:
    questions = _questions(3)
    file = AnswerFile(tmp_path / "a.jsonl", "k")
    file.add(questions, ["yes"] * 3)

    def never() -> tuple[Any, Any]:
        raise AssertionError("opened")

    assert answer_together(never, [Row(None, file)], questions, 16, 6) == 0.0


def test_summary_round_trips_and_judges(tmp_path: Path) -> None:
    questions = _questions(200)
    cost = Cost(10.0, 1.0, 100.0, [576.0, 173.0])
    good, bad = np.ones(100, dtype=bool), np.arange(100) < 60
    rows = [
        Answered(_spec("float"), {"a": good, "b": good}, 1.0, cost),
        Answered(_spec("better"), {"a": good, "b": good}, 1.0, cost),
        Answered(_spec("worse"), {"a": bad, "b": bad}, 1.0, cost),
    ]
    result = summarise(
        questions,
        rows,
        Settings(resamples=500),
        baseline="float",
        blind=None,
        compare=[("better", "worse"), ("worse", "better"), ("better", "float")],
    )
    assert [c.verdict for c in result.comparisons] == ["better", "worse", "undecided"]
    assert result.rows[2].retention is not None and result.rows[2].retention.value == pytest.approx(60)
    assert result.rows[0].average_visual_tokens == 374.5
    assert Evaluation.model_validate_json(result.model_dump_json()) == result
    alone = summarise(questions, rows[:1], Settings(), baseline=None, blind={"a": bad, "b": bad})
    assert alone.rows[0].retention is None and alone.blind_accuracy_by_task == {"a": 0.6, "b": 0.6}


def test_nothing_is_retained_of_a_float_row_without_a_right_answer() -> None:
    wrong = {"a": np.zeros(3, dtype=bool), "b": np.zeros(3, dtype=bool)}
    rows = [Answered(_spec(name), wrong, 1.0, Cost(1.0, 1.0, 1.0, [1.0])) for name in ("float", "row")]
    result = summarise(
        _questions(6), rows, Settings(resamples=20), baseline="float", blind=None, compare=[("row", "float")]
    )
    assert result.comparisons == [] and result.rows[1].retention is None
    json.loads(result.model_dump_json(), parse_constant=lambda name: pytest.fail(name))


def test_what_a_reader_must_not_overlook() -> None:
    """A task that float fails is in no retention, a row below the most frequent answer knows nothing: both are said."""
    questions = _questions(8)
    none, some, whole = np.zeros(4, dtype=bool), np.array([True, False, False, False]), np.ones(4, dtype=bool)
    cost = Cost(1.0, 1.0, 1.0, [1.0])
    rows = [
        Answered(_spec("float"), {"a": whole, "b": none}, 1.0, cost),
        Answered(_spec("row"), {"a": some, "b": whole}, 1.0, cost),
    ]
    result = summarise(questions, rows, Settings(resamples=20), baseline="float", blind=None)
    assert result.retention_leaves_out == ["b"] and result.rows[1].below_majority == ["a"]
    said = remarks(result)
    assert "Retention leaves out b, where the float row gets nothing right: it covers 1 of 2 tasks." in said
    assert "row is below the most frequent answer in a (1 of 2 tasks)." in said
    older = result.model_copy(update={"retention_leaves_out": None})
    assert remarks(older) == said, "reports of before the fields were recorded say it too"
    assert remarks(summarise(questions, rows[:1], Settings(), baseline=None, blind=None)) == [said[1]]
