"""Rows answered together say what each question is answered alone, through the engine and by `generate`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quota.core.errors import UsageError
from quota.eval import answering
from quota.eval.answering import AnswerFile, Row, answer_together, why_not_engine
from quota.eval.generation import answers, under
from quota.eval.questions import Question, mixed_questions, scene_questions
from quota.models.rtn import quantize_rtn
from tests.prune.recipes import recipe_for
from tests.speaking import speaking

TOKENS = 4


def opened(family: str, quantized: bool) -> tuple[Any, Any, list[Question]]:
    """A random model whose answers differ, its processor, and questions that suit it."""
    made = speaking(family, 3)
    processor = made.processor
    if family == "llava":
        questions = scene_questions(7, 168)
    else:
        processor.image_processor.size = {"shortest_edge": 4 * 64, "longest_edge": 32 * 64}
        questions = mixed_questions(7)
    made = quantize_rtn(made) if quantized else made
    made.processor = processor
    return made, processor, questions


def rows(model: Any, folder: Path) -> list[Row]:
    fields = {} if model.config.model_type == "llava" else {"reference": "per_image"}
    by_content = recipe_for(model, (2,), (0.5,), selections=[{"score": "random"}], seed=1, **fields)  # needs pixels
    recipes = [None, recipe_for(model, (1, 2), (0.5, 0.25), **fields), by_content]
    return [Row(recipe, AnswerFile(folder / f"{n}.jsonl", "k")) for n, recipe in enumerate(recipes)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("quantized", [True, False], ids=["engine", "generate"])
def test_together_as_alone(family: str, quantized: bool, threads: int, tmp_path: Path) -> None:
    model, processor, questions = opened(family, quantized)
    assert (why_not_engine(model) is None) == quantized
    together = rows(model, tmp_path)
    assert answer_together(lambda: (model, processor), together, questions, 3, TOKENS) > 0
    assert torch.get_num_threads() == threads and getattr(model, "quota_handle", None) is None
    said = []
    for row in together:
        with under(model, row.recipe):
            alone = [answers(model, processor, [q], TOKENS)[0] for q in questions]
        assert [row.file.known[q.id] for q in questions] == alone
        said.append(alone)
    assert len({tuple(texts) for texts in said}) > 1 and len(set(said[0])) > 1, "rows and questions differ"


@pytest.mark.parametrize("quantized", [True, False], ids=["engine", "generate"])
def test_images_are_encoded_once_for_all_rows(quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, questions = opened("llava", quantized)
    tower, encoded = type(model.model.vision_tower), list[int]()
    forward = tower.forward

    def watched(self: Any, pixels: torch.Tensor, *args: Any, **options: Any) -> Any:
        encoded.append(len(pixels))
        return forward(self, pixels, *args, **options)

    monkeypatch.setattr(tower, "forward", watched)
    answer_together(lambda: (model, processor), rows(model, tmp_path), questions, 3, TOKENS)
    assert sum(encoded) == 7, "not once per row"
    assert "forward" not in vars(model.model.vision_tower)


def test_what_the_engine_would_answer_otherwise(tmp_path: Path) -> None:
    model, processor, questions = opened("llava", True)
    model.generation_config.repetition_penalty = 1.5
    assert why_not_engine(model) == "generation_config: repetition_penalty is not the engine's"
    row = rows(model, tmp_path)[0]
    answer_together(lambda: (model, processor), [row], questions, 3, TOKENS)
    assert [row.file.known[q.id] for q in questions] == [answers(model, processor, [q], TOKENS)[0] for q in questions]


def test_a_failure_ends_all_threads_and_keeps_what_is_done(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, questions = opened("llava", True)

    def broken() -> Any:
        raise OSError("gone")

    questions = [*questions[:6], replace(questions[6], open_image=broken)]
    row = rows(model, tmp_path)[0]
    monkeypatch.setattr(answering, "_TOGETHER", 1)
    with pytest.raises(OSError, match="gone"):
        answer_together(lambda: (model, processor), [row], questions, 2, TOKENS)
    assert torch.get_num_threads() == threads
    kept = copy.copy(row.file.known)
    assert 2 <= len(kept) <= 6 and AnswerFile(tmp_path / "0.jsonl", "k").known == kept
    long = [replace(questions[0], instruction="star " * 5000)]
    with pytest.raises(UsageError, match="leave no room for an answer"):
        answer_together(lambda: (model, processor), [rows(model, tmp_path / "long")[0]], long, 2, TOKENS)
