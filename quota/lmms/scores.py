"""From lmms-eval's samples to scores that can be resampled.

A benchmark's score is a mean over independent units (a question; in MME the two questions about an image; in MMBench
one question in its rotated forms), or a sum of such means over strata (MME's categories). Each unit is scored by the
task's own aggregation, and the whole must equal the figure lmms-eval gives, so what is resampled is what is published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quota.core.errors import UsageError
from quota.eval.statistics import Scores, total

Sample = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """How a benchmark is taken apart. metrics: added up, each counts where a sample has it. `stratum` None: one mean
    over all units."""

    metrics: tuple[str, ...]
    unit: Callable[[Sample, Any], Hashable] = lambda sample, value: sample["doc_id"]
    stratum: Callable[[Any], str] | None = None
    score: Callable[[Callable[..., Any], list[Any]], float] = lambda aggregate, values: float(aggregate(values))


def _mmbench(aggregate: Callable[..., Any], values: list[Any]) -> float:
    """100 where every rotation of one question is answered right. The task's aggregation would write a file per call,
    so its evaluator is asked."""
    import pandas
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    table = pandas.DataFrame(values).sort_values(by="index")
    table["prediction"] = table["prediction"].astype(str)
    answers = dict(zip(table["index"], table["answer"], strict=True))
    return 100.0 * mmbench_evaluator.eval_sub_data(table, answers, static_only=aggregate.__name__.endswith("_static"))


_MMBENCH = Rule(("gpt_eval_score",), unit=lambda sample, value: value["index"] % 1_000_000, score=_mmbench)
RULES = {
    "mme": Rule(
        ("mme_perception_score", "mme_cognition_score"),
        lambda sample, value: (value["category"], value["question_id"]),
        lambda v: v["category"],
    ),
    "pope": Rule(("pope_accuracy",)),
    "seedbench": Rule(("seed_all",)),
    "mmbench_en_dev": _MMBENCH,
    "mmbench_en_dev_static": _MMBENCH,
}


@dataclass(frozen=True)
class Benchmark:
    """One task's outcome in one row. `answers`: document -> text."""

    metric: str
    scores: Scores
    answers: dict[int, str]

    @property
    def score(self) -> float:
        """As lmms-eval reports it."""
        return total(self.scores)


def take_apart(name: str, task: Any, samples: Sequence[Sample], figures: dict[str, Any]) -> Benchmark:
    """task: lmms-eval's task object; figures: its results, "metric,filter" -> value. UsageError where no metric of the
    task is a mean over units."""
    aggregations = task.aggregation()
    rules = (
        [RULES[name]]
        if name in RULES
        else [Rule((metric,)) for metric, good in task.higher_is_better().items() if good]
    )
    answers = {sample["doc_id"]: str(sample["filtered_resps"][0]).strip() for sample in samples}
    for rule in rules:
        published = [_figure(figures, metric) for metric in rule.metrics]
        if all(value is None for value in published):
            continue
        try:
            scores = _scores(rule, samples, aggregations)
        except (TypeError, ValueError, KeyError, AttributeError):  # values that cannot be aggregated one by one
            continue
        if math.isclose(
            total(scores), sum(value for value in published if value is not None), rel_tol=1e-6, abs_tol=1e-9
        ):
            return Benchmark(" + ".join(rule.metrics), scores, answers)
    raise UsageError(
        f"task {name}: none of its metrics ({', '.join(aggregations)}) is a mean over questions that reproduces"
        " lmms-eval's figure; retention needs one, run it by `python -m quota.lmms` for the figure alone"
    )


def _figure(figures: dict[str, Any], metric: str) -> float | None:
    found = [value for key, value in figures.items() if key.split(",")[0] == metric and isinstance(value, (int, float))]
    return float(found[0]) if found else None


def _scores(rule: Rule, samples: Sequence[Sample], aggregations: dict[str, Callable[..., Any]]) -> Scores:
    units: dict[tuple[str, Hashable], list[Any]] = {}
    of: dict[tuple[str, Hashable], Callable[..., Any]] = {}
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        for metric in rule.metrics:
            if metric in sample:
                value = sample[metric]
                key = (rule.stratum(value) if rule.stratum else "", rule.unit(sample, value))
                units.setdefault(key, []).append(value)
                of[key] = aggregations[metric]
    strata: dict[str, list[float]] = {}
    for key, values in units.items():
        strata.setdefault(key[0], []).append(rule.score(of[key], values))
    arrays = {name: np.array(values) for name, values in strata.items()}
    return arrays if rule.stratum else arrays[""]
