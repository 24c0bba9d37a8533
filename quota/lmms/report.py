"""Rows over named tasks: answered by lmms-eval, compared, written as JSON, Markdown and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from quota.allocate.compute import cost, decoder_sizes
from quota.core.errors import UsageError
from quota.core.files import atomic_write_text
from quota.eval.benchmark import weight_bytes
from quota.eval.generation import Cost, measure_cost
from quota.eval.paired import compared, resolution_sentence
from quota.eval.questions import Question
from quota.eval.remarks import left_out, left_out_sentence
from quota.eval.statistics import RESAMPLES, Interval, interval, resampled_retention, retention, retention_by_task
from quota.lmms.prompts import Conversation, Wrapper
from quota.lmms.results import TaskReport, TaskRow
from quota.lmms.run import Plan, find_tasks, run_tasks
from quota.lmms.scores import Benchmark
from quota.models import vision_macs
from quota.models.processing import BACKEND
from quota.report.pareto import Mark, save_pareto
from quota.report.style import BLUE
from quota.report.table import byte_size, markdown_table, milliseconds, rich_table

FLOAT = "float"
TIMED = 8


@dataclass(frozen=True)
class Configuration:
    """One row: weights and, or not, a recipe."""

    name: str
    checkpoint: str
    recipe: Path | None = None


@dataclass(frozen=True)
class EvalSettings:
    """How rows are asked. answers: folder for their logs, from which a stopped run goes on; None keeps nothing."""

    plan: Plan
    answers: Path | None = None
    batch: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    resamples: int = RESAMPLES
    seed: int = 0


@dataclass
class Outcome:
    """What one row did."""

    benchmarks: dict[str, Benchmark]
    spent: Cost
    records: list[dict[str, Any]]
    compute_ratio: float
    checkpoint_bytes: int
    figures: dict[str, Any] = field(default_factory=dict)


def evaluate_tasks(rows: Sequence[Configuration], settings: EvalSettings) -> TaskReport:
    """Every row answers every task; a row named `float` is what the others are compared with."""
    manager = find_tasks(settings.plan.tasks)
    from quota.lmms.model import Quota

    models = {
        row.name: Quota(**_given(row, settings)) for row in rows
    }  # all arguments are checked before the first row is answered
    outcomes = {}
    for row in rows:
        outcomes[row.name] = _outcome(models.pop(row.name), settings, manager)
    return summarise_tasks(rows, outcomes, settings)


def _given(row: Configuration, settings: EvalSettings) -> dict[str, Any]:
    given = {"pretrained": row.checkpoint, "recipe": row.recipe and str(row.recipe), "answers": settings.answers}
    return {
        "batch_size": settings.batch,
        "device": settings.device,
        "dtype": settings.dtype,
        **{k: v for k, v in given.items() if v is not None},
    }


def _outcome(model: Any, settings: EvalSettings, manager: Any) -> Outcome:
    benchmarks = run_tasks(model, settings.plan, manager)
    loaded, processor, wrapper = model.opened()
    found = model.records()
    records = [found[name, document] for name, benchmark in benchmarks.items() for document in benchmark.answers]
    timed = timed_questions(model.samples, wrapper)
    spent = measure_cost({"row": (loaded, processor, model.recipe)}, timed)["row"]
    figures = {key: [r[key] for r in records if r[key] is not None] for key in ("peak_memory_bytes", "power_w")}
    return Outcome(
        benchmarks,
        spent,
        records,
        compute_ratio(loaded.config, records),
        weight_bytes(model.folder),
        {
            "peak_memory_bytes": max(figures["peak_memory_bytes"], default=None),
            "power_w": fmean(figures["power_w"]) if figures["power_w"] else None,
        },
    )


def timed_questions(samples: dict[str, list[Conversation]], wrapper: Wrapper) -> list[Question]:
    """The first questions of each task in turn, those about an image where there are any."""
    pools = {task: [one for one in asked if one.images] or asked for task, asked in samples.items()}
    turns = [(task, asked[turn]) for turn in range(TIMED) for task, asked in pools.items() if turn < len(asked)]
    with_picture = [turn for turn in turns if turn[1].images] or turns
    if not with_picture:
        raise UsageError("tasks: none asks about at most one image in one turn, so no single request can be timed")
    return [
        Question(f"timed-{number}", task, one.text, "", partial(wrapper.prepare, one.images[0]) if one.images else None)
        for number, (task, one) in enumerate(with_picture[:TIMED])
    ]


def compute_ratio(config: Any, records: Sequence[dict[str, Any]]) -> float:
    """Mean over questions of pruned / unpruned multiply-accumulates of the prefill, vision tower included where there
    is an image."""
    sizes, ratios = decoder_sizes(config), []
    for record in records:
        visual = record["visual_tokens"]
        tower = vision_macs(config, visual) if visual else 0
        ratios.append(
            cost(record["visual_tokens_by_layer"], visual, record["prompt_tokens"] - visual, sizes, tower).ratio
        )
    return fmean(ratios)


def summarise_tasks(rows: Sequence[Configuration], outcomes: dict[str, Outcome], settings: EvalSettings) -> TaskReport:
    """Scores, retention, loyalty and paired differences."""
    scores = {name: {task: b.scores for task, b in outcome.benchmarks.items()} for name, outcome in outcomes.items()}
    tasks = outcomes[rows[0].name].benchmarks
    known = FLOAT in scores and any(v is not None for v in retention_by_task(scores[FLOAT], scores[FLOAT]).values())
    draws = _draws(scores, settings) if known else {}
    totals = {name: retention(scores[name], scores[FLOAT]) for name in scores} if known else {}
    others = [row.name for row in rows if row.name != FLOAT]
    return TaskReport(
        tasks={task: b.metric for task, b in tasks.items()},
        questions={task: len(b.answers) for task, b in tasks.items()},
        retention_leaves_out=left_out(retention_by_task(scores[FLOAT], scores[FLOAT])) if FLOAT in scores else [],
        data=None if settings.plan.data is None else str(settings.plan.data),
        limit=settings.plan.limit,
        batch=settings.batch,
        lmms_eval=version("lmms_eval"),
        image_backend=BACKEND,
        device=settings.device,
        resamples=settings.resamples,
        seed=settings.seed,
        timed_requests=TIMED,
        rows=[
            _row(row, outcomes, interval(totals[row.name], draws[row.name]) if known else None, settings)
            for row in rows
        ],
        comparisons=compared([(later, others[0]) for later in others[1:] if known], totals, draws),
    )


def _draws(scores: dict[str, dict[str, Any]], settings: EvalSettings) -> dict[str, np.ndarray]:
    return resampled_retention(scores, FLOAT, resamples=settings.resamples, seed=settings.seed)


def _row(
    row: Configuration, outcomes: dict[str, Outcome], retained: Interval | None, settings: EvalSettings
) -> TaskRow:
    own, reference = outcomes[row.name], outcomes.get(FLOAT)
    by_task: dict[str, Interval | None] = {}
    loyal, loyal_by_task = None, {}
    if reference is not None:
        for task, b in own.benchmarks.items():
            by_task[task] = _retained(b, reference.benchmarks[task], settings)
        same = {task: _same(b, reference.benchmarks[task]) for task, b in own.benchmarks.items()}
        all_same = {task: np.ones_like(values) for task, values in same.items()}
        drawn = resampled_retention(
            {"all": all_same, "row": same}, "all", resamples=settings.resamples, seed=settings.seed
        )["row"]
        loyal, loyal_by_task = (
            interval(retention(same, all_same), drawn),
            {task: round(100 * float(v.mean()), 3) for task, v in same.items()},
        )
    layers = [fmean(r["visual_tokens_by_layer"]) for r in own.records]
    return TaskRow(
        name=row.name,
        checkpoint=row.checkpoint,
        recipe=None if row.recipe is None else str(row.recipe),
        scores={task: b.score for task, b in own.benchmarks.items()},
        retention=retained,
        retention_by_task=by_task,
        loyalty=loyal,
        loyalty_by_task=loyal_by_task,
        visual_tokens=round(fmean(r["visual_tokens"] for r in own.records), 3),
        average_visual_tokens=round(fmean(layers), 3),
        compute_ratio=round(own.compute_ratio, 6),
        kv_bytes=own.spent.kv_bytes,
        prefill_ms=round(own.spent.prefill_ms, 3),
        decode_ms=round(own.spent.decode_ms, 3),
        checkpoint_bytes=own.checkpoint_bytes,
        **own.figures,
    )


def _retained(own: Benchmark, reference: Benchmark, settings: EvalSettings) -> Interval | None:
    scores = {FLOAT: {"": reference.scores}, "row": {"": own.scores}}
    value = retention_by_task(scores["row"], scores[FLOAT])[""]
    return None if value is None else interval(value, _draws(scores, settings)["row"])


def _same(own: Benchmark, reference: Benchmark) -> np.ndarray:
    return np.array(
        [own.answers[document] == text for document, text in sorted(reference.answers.items())], dtype=float
    )


# -- faces
# ---------------------------------------------------------------------------------------------------------------


def _summary(report: TaskReport) -> tuple[list[str], list[list[str]]]:
    compared = report.rows[0].loyalty is not None
    columns = [
        "row",
        *(["retention", "loyalty"] if compared else []),
        "visual tokens",
        "compute",
        "KV",
        "prefill",
        "decode",
    ]
    rows = [
        [
            row.name,
            *([_span(row.retention), _span(row.loyalty)] if compared else []),
            f"{row.average_visual_tokens:.1f}",
            f"{100 * row.compute_ratio:.1f} %",
            byte_size(row.kv_bytes),
            milliseconds(row.prefill_ms),
            milliseconds(row.decode_ms),
        ]
        for row in report.rows
    ]
    return columns, rows


def _by_task(report: TaskReport) -> tuple[list[str], list[list[str]]]:
    """Score, and behind it percent of the float row."""
    cells = [
        [
            task,
            str(asked),
            *(f"{row.scores[task]:.4g}" + _behind(row, row.retention_by_task.get(task)) for row in report.rows),
        ]
        for task, asked in report.questions.items()
    ]
    return ["task", "questions", *(row.name for row in report.rows)], cells


def _span(value: Interval | None) -> str:
    return f"{value.value:.1f} ({value.low:.1f} to {value.high:.1f})" if value else "-"


def _behind(row: TaskRow, value: Interval | None) -> str:
    return f" = {value.value:.1f} % ({value.low:.1f} to {value.high:.1f})" if value and row.name != FLOAT else ""


def task_tables(report: TaskReport) -> list[Table | str]:
    """For a terminal: tables, and what they leave out."""
    missing = [left_out_sentence(report.retention_leaves_out, len(report.tasks))] if report.retention_leaves_out else []
    return [
        rich_table(*_summary(report)),
        rich_table(*_by_task(report)),
        *missing,
        *resolution_sentence(report.comparisons),
    ]


def markdown(report: TaskReport) -> str:
    """Rows, scores per task, differences, and how it was measured."""
    parts = ["### Evaluation by lmms-eval", markdown_table(*_summary(report)), markdown_table(*_by_task(report))]
    if report.retention_leaves_out:
        parts.append(left_out_sentence(report.retention_leaves_out, len(report.tasks)))
    if report.comparisons:
        words = {"better": "is better than", "worse": "is worse than", "undecided": "cannot be told from"}
        parts.append(
            "\n".join(
                f"- {c.row} {words[c.verdict]} {c.against}: {c.difference.value:+.2f} points of retention"
                f" ({c.difference.low:+.2f} to {c.difference.high:+.2f})"
                for c in report.comparisons
            )
        )
        parts += resolution_sentence(report.comparisons)
    metrics = ", ".join(
        f"{metric} of {', '.join(t for t, m in report.tasks.items() if m == metric)}"
        for metric in dict.fromkeys(report.tasks.values())
    )
    compared = (
        ""
        if report.rows[0].loyalty is None
        else (
            " Behind a score, percent of the float model's. Retention is the mean of those percents over tasks,"
            " loyalty the percent of answers that equal the float model's word for word; both with 95 % paired"
            f" bootstrap intervals ({report.resamples} resamples)."
        )
    )
    gpu = "" if report.device.startswith("cuda") else " No GPU was used, so there is no power or GPU memory."
    parts.append(
        f"Scores are lmms-eval's: {metrics}{f', the first {report.limit} questions of each' if report.limit else ''};"
        f" lmms-eval {report.lmms_eval}, batch {report.batch}, images by {report.image_backend},"
        f" {report.device}.{compared} Visual tokens are means over questions and layers, compute is the prefill's"
        f" multiply-accumulates over the unpruned prefill's; KV, prefill and decode come from {report.timed_requests}"
        f" single requests, row after row.{gpu}"
    )
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def write_report(report: TaskReport, out: Path) -> None:
    """eval.md, eval.json and eval.png in `out`."""
    marks = [
        Mark(
            row.name,
            (r.value, r.low, r.high) if (r := row.retention) else None,
            {
                "compute, percent of unpruned": 100 * row.compute_ratio,
                "KV cache, kB": row.kv_bytes / 1e3,
                "time to first token, ms": row.prefill_ms,
            },
        )
        for row in report.rows
    ]
    if all(mark.value is not None for mark in marks):
        note = "percent of the float model with 95 % intervals; the line joins rows that no other row beats"
        save_pareto(out / "eval.png", "Accuracy against cost", note, marks, BLUE)
    atomic_write_text(out / "eval.md", markdown(report))
    atomic_write_text(out / "eval.json", report.model_dump_json(indent=1) + "\n")
