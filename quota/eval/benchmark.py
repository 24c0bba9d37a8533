"""Rows over questions, summed up in one `Evaluation`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quota.eval.generation import Cost
from quota.eval.paired import compared
from quota.eval.questions import Question, questions_fingerprint
from quota.eval.remarks import below_majority, left_out
from quota.eval.results import Evaluation, Row
from quota.eval.score import accuracies, by_task, is_right, majority_accuracy, mean_accuracy
from quota.eval.statistics import RESAMPLES, interval, resampled_retention, retention, retention_by_task
from quota.models.processing import BACKEND
from quota.runtime.load import ON_CPU, Placement

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


@dataclass(frozen=True)
class RowSpec:
    """One configuration. checkpoint, recipe: their names for readers. key: its exact content (weights, recipe), for
    resuming. weights: the content of its weights alone; rows that share them share a loaded model. plan: the recipe
    that prunes. open: loads (model without a recipe, processor)."""

    name: str
    checkpoint: str
    recipe: str | None
    key: str
    checkpoint_bytes: int
    kv_dtype: str
    weights: str
    plan: Recipe | None
    open: Callable[[], tuple[Any, Any]]


@dataclass(frozen=True)
class Settings:
    batch: int = 16
    max_new_tokens: int = 6
    resamples: int = RESAMPLES
    seed: int = 0
    place: Placement = ON_CPU


def rights(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, np.ndarray]:
    return by_task(questions, [is_right(p, q.answer) for q, p in zip(questions, predictions, strict=True)])


@dataclass(frozen=True)
class Answered:
    """One row's right/wrong per task, its seconds and its costs."""

    spec: RowSpec
    right: dict[str, np.ndarray]
    seconds: float
    cost: Cost


def summarise(
    questions: Sequence[Question],
    rows: Sequence[Answered],
    settings: Settings,
    *,
    baseline: str | None,
    blind: dict[str, np.ndarray] | None,
    compare: Sequence[tuple[str, str]] = (),
    timed_requests: int = 0,
) -> Evaluation:
    """Accuracies, retention against row `baseline` and paired comparisons of pairs of row names."""
    majority = majority_accuracy(questions)
    right = {r.spec.name: r.right for r in rows}
    draws = resampled_retention(right, baseline, resamples=settings.resamples, seed=settings.seed) if baseline else {}
    totals = {name: retention(right[name], right[baseline]) for name in right} if baseline else {}
    known = {
        name for name, value in totals.items() if not math.isnan(value)
    }  # nothing is retained of a float row without a right answer
    comparisons = compared([(a, b) for a, b in compare if {a, b} <= known], totals, draws)
    return Evaluation(
        questions=len(questions),
        questions_by_task={task: len(v) for task, v in rows[0].right.items()},
        questions_fingerprint=questions_fingerprint(questions),
        majority_accuracy_by_task=majority,
        retention_leaves_out=left_out(retention_by_task(right[baseline], right[baseline])) if baseline else [],
        blind_accuracy_by_task=accuracies(blind) if blind is not None else None,
        resamples=settings.resamples,
        seed=settings.seed,
        image_backend=BACKEND,
        timed_requests=timed_requests,
        comparisons=comparisons,
        rows=[_row(r, right[baseline] if baseline and known else None, totals, draws, majority) for r in rows],
    )


def _row(
    answered: Answered,
    baseline: dict[str, np.ndarray] | None,
    totals: dict[str, float],
    draws: dict[str, np.ndarray],
    majority: dict[str, float],
) -> Row:
    spec, cost = answered.spec, answered.cost
    return Row(
        name=spec.name,
        checkpoint=spec.checkpoint,
        recipe=spec.recipe,
        accuracy=mean_accuracy(answered.right),
        accuracy_by_task=accuracies(answered.right),
        retention=interval(totals[spec.name], draws[spec.name]) if baseline else None,
        retention_by_task=retention_by_task(answered.right, baseline) if baseline else {},
        below_majority=below_majority(accuracies(answered.right), majority),
        prefill_ms_by_request=[round(ms, 3) for ms in cost.prefill_ms_by_request],
        decode_ms_by_request=[round(ms, 3) for ms in cost.decode_ms_by_request],
        prefill_ms=round(cost.prefill_ms, 3),
        decode_ms=round(cost.decode_ms, 3),
        kv_bytes=cost.kv_bytes,
        kv_dtype=spec.kv_dtype,
        checkpoint_bytes=spec.checkpoint_bytes,
        average_visual_tokens=round(cost.average_visual_tokens, 3),
        visual_tokens_by_layer=cost.visual_tokens_by_layer,
        answer_seconds=round(answered.seconds, 2),
        gpu_peak_bytes=cost.gpu_peak_bytes,
        gpu_power_w=cost.gpu_power_w,
        gpu_power_why_not=cost.gpu_power_why_not,
    )


def weight_bytes(checkpoint: Path) -> int:
    """Bytes of a checkpoint folder's weight files."""
    return sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
