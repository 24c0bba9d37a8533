"""A study as Markdown and as a figure."""

from __future__ import annotations

from pathlib import Path

from quota.report.study_plots import Bar, Point, save_bars, save_curve, save_groups, save_tradeoff
from quota.report.table import byte_size, markdown_table
from quota.study.results import StudyReport, StudyRow


def markdown(report: StudyReport) -> str:
    """Rows, what they say about the random floor, paired differences, published figures apart from them, and how it was
    measured."""
    tasks = list(report.questions_by_task)
    extra = sorted({key for row in report.rows for key in row.figures if isinstance(row.figures[key], str)})
    columns = [
        "row",
        "retention",
        "95 % interval",
        *tasks,
        "visual tokens",
        "layer mean",
        "GMACs",
        "compute",
        "KV in 4 bits",
        *extra,
    ]
    parts = [
        f"### {report.title}",
        provenance(report),
        markdown_table(columns, [_cells(row, tasks, extra) for row in report.rows]),
    ]
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes))
    if report.comparisons:
        parts.append(differences(report))
    if report.published:
        names = [[p.name, f"{p.retention:.2f}", p.measures] for p in report.published]
        parts.append(
            "Published figures of the same configurations, on another model and other questions; they are in no average"
            " above.\n\n" + markdown_table(["published row", "retention", "measured on"], names)
        )
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def differences(report: StudyReport) -> str:
    """Paired differences of retention."""
    rows = [
        [
            c.row,
            c.against,
            f"{c.difference.value:+.2f}",
            f"{c.difference.low:+.2f} to {c.difference.high:+.2f}",
            "-" if c.corrected is None else f"{c.corrected.low:+.2f} to {c.corrected.high:+.2f}",
            c.verdict,
        ]
        for c in report.comparisons
    ]
    columns = ["row", "against", "difference, points", "95 % interval", "for all at once", "verdict"]
    return markdown_table(columns, rows)


def _cells(row: StudyRow, tasks: list[str], extra: list[str]) -> list[str]:
    r = row.retention
    return [
        row.name,
        f"{r.value:.1f}",
        f"{r.low:.1f} to {r.high:.1f}",
        *(f"{100 * row.accuracy_by_task[t]:.1f}" for t in tasks),
        str(row.final_visual_tokens),
        f"{row.average_visual_tokens:.1f}",
        f"{row.gmacs:.3g}",
        f"{100 * row.compute_ratio:.1f} %",
        byte_size(row.kv_bytes),
        *(str(row.figures.get(key, "-")) for key in extra),
    ]


def provenance(report: StudyReport) -> str:
    """How it was measured, in a paragraph."""
    by_task = ", ".join(f"{task} {count}" for task, count in report.questions_by_task.items())
    return (
        f"{report.questions} questions ({by_task}) of `{report.tasks}`, {report.model} model ({report.family}),"
        f" {report.calibration_samples} calibration samples. Retention is the mean over tasks of accuracy / float"
        f" accuracy in percent, with a paired bootstrap interval ({report.resamples} resamples, the same questions in"
        " every row); tasks are exact-match accuracy in percent. GMACs, compute and KV follow the cost model for one"
        " figure."
    )


def save_chart(path: Path, report: StudyReport, kind: str) -> None:
    """PNG. kind: "bars" (retention per row), "keep" (against the keep ratio), "compute" (against compute) or "orders"
    (methods in three orders)."""
    note = f"percent of the float model, {report.questions} questions, with 95 % intervals"
    points = {row.name: Point(row.retention.value, row.retention.low, row.retention.high) for row in report.rows}
    if kind == "keep":
        own = [(100 * row.figures["keep"], points[row.name]) for row in report.rows if "keep" in row.figures]
        published = [(float(p.name.split()[1]), p.retention) for p in report.published]
        save_curve(path, report.title, note, own, published)
    elif kind == "compute":
        save_tradeoff(
            path,
            report.title,
            note,
            [(row.name, row.weights, 100 * row.compute_ratio, points[row.name]) for row in report.rows[1:]],
        )
    elif kind == "orders":
        save_groups(path, report.title, note, [(*_method_and_order(row), points[row.name]) for row in report.rows[1:]])
    else:
        published_by = {p.name: p.retention for p in report.published}
        save_bars(
            path,
            report.title,
            note,
            [Bar(row.name, points[row.name], published_by.get(row.name)) for row in report.rows[1:]],
        )


def _method_and_order(row: StudyRow) -> tuple[str, str]:
    """("fastv", "prune-only") of "fastv, prune-only"; the stage-wise rows are the orders themselves."""
    method, comma, order = row.name.partition(", ")
    if comma:
        return method, order
    return ("uniform", row.name) if row.method == "uniform" else (row.name, row.name)
