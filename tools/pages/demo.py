"""The demo's blocks of README.md, docs/results.md and docs/report.md, from the reports kept in docs/demo only."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import BaseModel

from quota.demo.embedded import DEFAULT, FAMILIES
from quota.demo.report import Environment, ModelFacts, Report, SideBySide, Stage
from quota.eval.remarks import remarks
from quota.eval.results import Comparison, Evaluation, Row
from quota.eval.statistics import Interval
from quota.models import family_class
from quota.report.table import markdown_table

README, RESULTS, FIELDS = Path("README.md"), Path("docs/results.md"), Path("docs/report.md")
KEPT = Path("docs/demo")
FIGURES = ("overlay", "profile_plot", "recipe_plot")  # and every other overlay
_DOCUMENTED: tuple[tuple[str, type[BaseModel]], ...] = (
    ("(top level)", Report),
    ("environment", Environment),
    ("model", ModelFacts),
    ("answers[]", SideBySide),
    ("evaluation", Evaluation),
    ("evaluation.rows[]", Row),
    ("evaluation.comparisons[]", Comparison),
    ("retention, difference", Interval),
    ("stages[]", Stage),
)


def figures_block(report: Report) -> str:
    """Tables of one demo run, Markdown."""
    e, env = report.evaluation, report.environment
    tasks = list(e.questions_by_task)
    model = report.model
    family = "" if model.family == DEFAULT else f" --family {model.family}"
    tokens = f"{model.visual_tokens} visual tokens" + (" in the median image" if model.image_size_px is None else "")
    lines = [
        (
            f"`quota demo{family} --keep {report.keep:g}` on {env.cpu}, {env.threads} threads, torch {env.torch},"
            f" {env.native}: embedded model, {model.parameters / 1e6:.1f} M parameters, {tokens}, {e.questions}"
            " held-out questions."
        ),
        "",
        "| row | " + " | ".join(tasks) + " | mean | retention (95 % interval) |",
        "|---|" + "---:|" * (len(tasks) + 2),
    ]
    for row in e.rows:
        r = row.retention
        kept = f"{r.value:.1f} ({r.low:.1f} to {r.high:.1f})" if r else "-"
        lines.append(
            f"| {row.name} | "
            + " | ".join(f"{100 * row.accuracy_by_task[t]:.0f}" for t in tasks)
            + f" | {100 * row.accuracy:.1f} | {kept} |"
        )
    for name, values in (
        ("most frequent answer", e.majority_accuracy_by_task),
        ("blind (no image)", e.blind_accuracy_by_task),
    ):
        if values is not None:
            lines.append(
                f"| *{name}* | "
                + " | ".join(f"{100 * values[t]:.0f}" for t in tasks)
                + f" | {100 * sum(values.values()) / len(values):.1f} | |"
            )
    lines += [
        "",
        "| row | prefill ms | decode ms | KV cache kB | weights MB | visual tokens, mean over layers |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.name} | {row.prefill_ms:.1f} | {row.decode_ms:.2f} | {row.kv_bytes / 1e3:.0f} ({row.kv_dtype}) "
        f"| {row.checkpoint_bytes / 1e6:.2f} | {row.average_visual_tokens:.1f} |"
        for row in e.rows
    ]
    columns = "| compared | difference of retention, points | 95 % interval | for all at once | verdict |"
    lines += ["", columns, "|---|---:|---:|---:|---|"]
    lines += [
        f"| {c.row} minus {c.against} | {c.difference.value:+.2f} | {c.difference.low:+.2f} to {c.difference.high:+.2f}"
        + (f" | {c.corrected.low:+.2f} to {c.corrected.high:+.2f}" if c.corrected else " | -")
        + f" | {c.verdict} |"
        for c in e.comparisons
    ]
    lines += ["", " ".join([verdict(report), *remarks(e)])]
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """Whether collaborative beats the stage-wise rows, as the intervals say."""
    stagewise = [
        c
        for c in report.evaluation.comparisons
        if c.row == "collaborative" and c.against.endswith(("prune", "quantize"))
    ]
    parts = [
        f"{c.verdict} than {c.against}" if c.verdict != "undecided" else f"not distinguishable from {c.against}"
        for c in stagewise
    ]
    return "On these questions the collaborative row is " + " and ".join(parts) + "."


def fields_block() -> str:
    """The field table of report.json, from the models that write it."""
    lines = ["| where | field | meaning |", "|---|---|---|"]
    for where, model in _DOCUMENTED:
        for name, info in model.model_fields.items():
            lines.append(f"| {where} | `{name}` | {(info.description or '').replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def savings_block(report: Report) -> str:
    """What a recipe saves, in a paragraph: the final share beside the mean over layers, which compute follows."""
    rows = {row.name: row for row in report.evaluation.rows}
    whole, pruned, told = rows["quant-only"], rows["collaborative"], report.recipes["collaborative"]
    layers, stages = pruned.visual_tokens_by_layer, told["candidates"]
    kept = ", ".join(f"{layers[at]:.0f} stay from layer {at}" for at in stages)
    total, mean = whole.average_visual_tokens, pruned.average_visual_tokens
    return (
        f"At `--keep {report.keep:g}` on the embedded {family_class(report.model.family).title}, {total:.0f} visual"
        f" tokens enter; {kept} on.\nThat is {layers[-1]:.0f} of {total:.0f} ({100 * layers[-1] / total:.0f} %) at the"
        f" end, but {mean:.0f} ({100 * mean / total:.0f} %) as the mean over the {len(layers)} layers, and compute"
        f" follows the mean:\nthe prefill, vision tower included, takes {100 * told['compute_ratio']:.0f} % of the"
        f" multiply-accumulates (the language model {100 * told['compute_ratio_language']:.0f} %), and the 4-bit"
        f" cache\nholds {pruned.kv_bytes / 1e3:.0f} kB instead of {whole.kv_bytes / 1e3:.0f}."
    )


def summary_block(reports: dict[str, Report]) -> str:
    """README's table: what every row of the demo keeps and costs, the families side by side. reports: family -> its
    kept run."""
    heads = [
        f"{family_class(family).title}: {what}"
        for family in reports
        for what in ("retention", "tokens at the end, mean", "KV cache kB")
    ]
    rows = {family: {row.name: row for row in report.evaluation.rows} for family, report in reports.items()}
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    return markdown_table(
        ["row", *heads], [[name, *(cell for f in reports for cell in _summary(rows[f].get(name)))] for name in names]
    ).rstrip("\n")


def _summary(row: Row | None) -> list[str]:
    if row is None or row.retention is None:
        return ["-"] * 3
    tokens = f"{row.visual_tokens_by_layer[-1]:.0f}, {row.average_visual_tokens:.0f}"
    return [
        f"{row.retention.value:.1f} ({row.retention.low:.1f} to {row.retention.high:.1f})",
        tokens,
        f"{row.kv_bytes / 1e3:.0f}",
    ]


def blocks(kept: Path = KEPT) -> dict[Path, dict[str, str]]:
    """File -> block name -> text, for every family the figures of its kept run."""
    files = {family: kept / family / "report.json" for family in FAMILIES}
    reports = {
        family: Report.model_validate_json(file.read_text(encoding="utf-8"))
        for family, file in files.items()
        if file.exists()
    }
    results = {
        f"figures:{family}": figures_block(reports[family]) if family in reports else "No run of it is kept yet."
        for family in FAMILIES
    }
    said = {
        "savings": savings_block(reports[DEFAULT]) if DEFAULT in reports else "No run of it is kept yet.",
        "summary": summary_block(reports),
    }
    return {README: said, RESULTS: results, FIELDS: {"fields": fields_block()}}


def keep(source: Path, kept: Path = KEPT) -> Path:
    """Copy a finished run's report and figures to its family's folder, which is returned; figures of an older run are
    removed."""
    report = Report.model_validate_json((source / "report.json").read_text(encoding="utf-8"))
    folder = kept / report.model.family
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    figures = [path for what, path in report.files.items() if what in FIGURES or what.startswith("overlay-")]
    for name in ("report.json", *figures):
        shutil.copyfile(source / name, folder / name)
    return folder
