"""Running one study: rows answered, summed up, written as JSON, Markdown and a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from quota.core.errors import UsageError
from quota.core.files import atomic_write_text
from quota.core.formats import DEFAULT
from quota.eval.paired import compared, resolution_sentence
from quota.eval.pipeline import Entry
from quota.eval.questions import questions_fingerprint
from quota.eval.remarks import below_sentences, left_out, left_out_sentence
from quota.eval.results import Comparison
from quota.eval.score import accuracies, majority_accuracy, mean_accuracy
from quota.eval.statistics import interval, resampled_retention, retention, retention_by_task
from quota.study.bench import Bench, StudySettings
from quota.study.layers import profile_study, show_study
from quota.study.published import published
from quota.study.render import markdown, save_chart
from quota.study.results import StudyReport, StudyRow
from quota.study.runtime import runtime
from quota.study.tables import TABLES, Plan

STUDIES = {
    "modules": "Table 1: which parts are quantized",
    "keep": "Table 2: QUOTA at 50 to 5 % of the visual tokens",
    "pipelines": "Table 3: joint against stage-wise quantization and pruning",
    "compute": f"Table 4: every method at equal compute, float and {DEFAULT.title}",
    "weights": "Table 5: score weights, leave-one-out, each signal alone, the sign of the quantization term",
    "formats": f"weights alone in 4 bits by RTN, GPTQ and AWQ beside {DEFAULT.title}, with and without the recipe",
    "runtime": "Table 7: disk, peak memory, power, and accuracy of float, reference and native arithmetic",
    "profile": "Figures 3 and 5: concentration, redundancy and sensitivity per layer",
    "show": "Figure 4: kept tokens per layer for one image",
}


def run_study(name: str, settings: StudySettings) -> Any:
    """The report of study `name`, also written to `settings.out` as <name>.json, <name>.md and <name>.png.

    Returns a StudyReport, or for `profile` and `show` a plain dictionary. UsageError for an unknown name.
    """
    if name not in STUDIES:
        raise UsageError(f"NAME: expected one of {', '.join(STUDIES)}, got {name!r}")
    bench = Bench(settings)
    if name == "profile":
        return profile_study(bench)
    if name == "show":
        return show_study(bench)
    plan = runtime(bench) if name == "runtime" else TABLES[name](bench)
    return finish(bench, name, plan)


def _remarks(bench: Bench, right: dict[str, dict[str, Any]], baseline: str) -> list[str]:
    """What retention leaves out, and rows below the most frequent answer."""
    missing = left_out(retention_by_task(right[baseline], right[baseline]))
    sentence = [left_out_sentence(missing, len(right[baseline]))] if missing else []
    return sentence + below_sentences(
        {row: accuracies(values) for row, values in right.items()}, majority_accuracy(bench.questions)
    )


def finish(bench: Bench, name: str, plan: Plan) -> StudyReport:
    """Answer the plan's rows and write the report."""
    right = bench.answered(plan.entries)
    baseline = plan.entries[0].name
    s = bench.settings
    totals = {row: retention(values, right[baseline]) for row, values in right.items()}
    if math.isnan(totals[baseline]):
        raise UsageError(
            "tasks: the float model answers no question correctly, so nothing can be retained; ask other questions or"
            " more of them"
        )
    draws = resampled_retention(right, baseline, resamples=s.resamples, seed=s.seed)
    comparisons = compared(plan.compare, totals, draws)
    recipes = _save_recipes(bench, name, plan.entries)
    notes = [
        *plan.notes,
        *_where(s),
        *against_random(comparisons),
        *resolution_sentence(comparisons),
        *_remarks(bench, right, baseline),
    ]
    report = StudyReport(
        study=name,
        title=plan.title,
        model=s.model or "embedded",
        family=bench.family,
        fingerprint=bench.facts.fingerprint,
        tasks=s.tasks,
        questions=len(bench.questions),
        questions_by_task={task: len(values) for task, values in right[baseline].items()},
        questions_fingerprint=questions_fingerprint(bench.questions),
        calibration_samples=len(bench.samples),
        resamples=s.resamples,
        seed=s.seed,
        rows=[
            _row(bench, e, right[e.name], interval(totals[e.name], draws[e.name]), recipes.get(e.name))
            for e in plan.entries
        ],
        comparisons=comparisons,
        notes=notes,
        published=published(name, bench.family),
        files={"markdown": f"{name}.md", "json": f"{name}.json", "plot": f"{name}.png"},
    )
    save_chart(s.out / f"{name}.png", report, plan.chart)
    atomic_write_text(s.out / f"{name}.md", markdown(report))
    atomic_write_text(s.out / f"{name}.json", report.model_dump_json(indent=1) + "\n")
    return report


def _where(settings: StudySettings) -> list[str]:
    place = settings.place
    return [f"Rows answered on {place.device}, with {place.dtype} in what is not quantized."] if place.key else []


def against_random(comparisons: Sequence[Comparison]) -> list[str]:
    """One sentence per setting that has a random row: which methods beat it, which it beats, and which cannot be told
    from it."""
    floors = dict.fromkeys(c.against for c in comparisons if c.against.startswith("random"))
    out = []
    for floor in floors:
        setting = floor.removeprefix("random").strip(" ,()")
        known = [c for c in comparisons if c.against == floor]
        groups = {
            words: [
                f"{c.row.removesuffix(floor.removeprefix('random'))} ({c.difference.value:+.1f})"
                for c in known
                if c.verdict == verdict
            ]
            for verdict, words in (
                ("better", "better than random"),
                ("undecided", "not told apart from it"),
                ("worse", "worse"),
            )
        }
        out.append(
            f"{setting}: "
            + "; ".join(f"{words}: {', '.join(names) or 'none'}" for words, names in groups.items())
            + "."
        )
    return out


def _row(bench: Bench, entry: Entry, right: dict[str, np.ndarray], retained: Any, recipe: str | None) -> StudyRow:
    spent = bench.cost(entry.recipe)
    return StudyRow(
        name=entry.name,
        weights=entry.weights,
        recipe=recipe,
        method=entry.recipe.method if entry.recipe else None,
        accuracy=mean_accuracy(right),
        accuracy_by_task=accuracies(right),
        retention=retained,
        final_visual_tokens=spent.final_visual_tokens,
        average_visual_tokens=round(spent.average_visual_tokens, 3),
        gmacs=round(spent.macs / 1e9, 6),
        compute_ratio=round(spent.ratio, 6),
        kv_bytes=spent.kv_bytes,
        figures=entry.figures,
    )


def _save_recipes(bench: Bench, study: str, entries: Sequence[Entry]) -> dict[str, str]:
    """row name -> path of its recipe, relative to the report."""
    saved = {}
    for number, entry in enumerate(entries):
        if entry.recipe is not None:
            path = f"recipes/{study}-{number:02d}-{entry.recipe.method}.json"
            entry.recipe.save(bench.settings.out / path)
            saved[entry.name] = path
    return saved
