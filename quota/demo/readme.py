"""Fill README.md's generated blocks: `python -m quota.demo.readme [demo-out]`.

With a folder, its report and pictures are copied to docs/demo/FAMILY first; the figures in README come from the reports there only.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from pydantic import BaseModel

from quota.core.files import atomic_write_text
from quota.demo.embedded import DEFAULT, FAMILIES
from quota.demo.report import Environment, ModelFacts, Report, SideBySide, Stage
from quota.eval.remarks import remarks
from quota.eval.results import Comparison, Evaluation, Row
from quota.eval.statistics import Interval
from quota.report.blocks import fill

README = Path("README.md")
KEPT = Path("docs/demo")
PICTURES = ("overlay", "profile_plot", "recipe_plot")  # and every other overlay
_DOCUMENTED: tuple[tuple[str, type[BaseModel]], ...] = (
    ("(top level)", Report), ("environment", Environment), ("model", ModelFacts), ("answers[]", SideBySide), ("evaluation", Evaluation),
    ("evaluation.rows[]", Row), ("evaluation.comparisons[]", Comparison), ("retention, difference", Interval), ("stages[]", Stage),
)  # fmt: skip


def figures_block(report: Report) -> str:
    """Tables of one demo run, Markdown."""
    e, env = report.evaluation, report.environment
    tasks = list(e.questions_by_task)
    model = report.model
    family = "" if model.family == DEFAULT else f" --family {model.family}"
    tokens = f"{model.visual_tokens} visual tokens" + (" in the median picture" if model.image_size_px is None else "")
    lines = [
        f"`quota demo{family} --keep {report.keep:g}` on {env.cpu}, {env.threads} threads, torch {env.torch}, {env.native}: embedded model, "
        f"{model.parameters / 1e6:.1f} M parameters, {tokens}, {e.questions} held-out questions.",
        "",
        "| row | " + " | ".join(tasks) + " | mean | retention (95 % interval) |",
        "|---|" + "---:|" * (len(tasks) + 2),
    ]
    for row in e.rows:
        r = row.retention
        kept = f"{r.value:.1f} ({r.low:.1f} to {r.high:.1f})" if r else "-"
        lines.append(f"| {row.name} | " + " | ".join(f"{100 * row.accuracy_by_task[t]:.0f}" for t in tasks) + f" | {100 * row.accuracy:.1f} | {kept} |")
    for name, values in (("most frequent answer", e.majority_accuracy_by_task), ("blind (no picture)", e.blind_accuracy_by_task)):
        if values is not None:
            lines.append(f"| *{name}* | " + " | ".join(f"{100 * values[t]:.0f}" for t in tasks) + f" | {100 * sum(values.values()) / len(values):.1f} | |")
    lines += ["", "| row | prefill ms | decode ms | KV cache kB | weights MB | visual tokens, mean over layers |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {row.name} | {row.prefill_ms:.1f} | {row.decode_ms:.2f} | {row.kv_bytes / 1e3:.0f} ({row.kv_dtype}) "
        f"| {row.checkpoint_bytes / 1e6:.2f} | {row.average_visual_tokens:.1f} |"
        for row in e.rows
    ]
    lines += ["", "| compared | difference of retention, points | 95 % interval | verdict |", "|---|---:|---:|---|"]
    lines += [
        f"| {c.row} minus {c.against} | {c.difference.value:+.2f} | {c.difference.low:+.2f} to {c.difference.high:+.2f} | {c.verdict} |" for c in e.comparisons
    ]
    lines += ["", " ".join([verdict(report), *remarks(e)])]
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """Whether collaborative beats the stage-wise rows, as the intervals say."""
    stagewise = [c for c in report.evaluation.comparisons if c.row == "collaborative" and c.against.endswith(("prune", "quantize"))]
    parts = [f"{c.verdict} than {c.against}" if c.verdict != "undecided" else f"not distinguishable from {c.against}" for c in stagewise]
    return "On these questions the collaborative row is " + " and ".join(parts) + "."


def fields_block() -> str:
    """The field table of report.json, from the models that write it."""
    lines = ["| where | field | meaning |", "|---|---|---|"]
    for where, model in _DOCUMENTED:
        for name, info in model.model_fields.items():
            lines.append(f"| {where} | `{name}` | {(info.description or '').replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def blocks(kept: Path = KEPT) -> dict[str, str]:
    """Block name -> text, for every family the figures of its kept run."""
    out = {"fields": fields_block()}
    for family in FAMILIES:
        report = kept / family / "report.json"
        known = report.exists()
        out[f"figures:{family}"] = figures_block(Report.model_validate_json(report.read_text(encoding="utf-8"))) if known else "No run of it is kept yet."
    return out


def keep(source: Path, kept: Path = KEPT) -> Path:
    """Copy a finished run's report and pictures to its family's folder, which is returned; pictures of an older run are removed."""
    report = Report.model_validate_json((source / "report.json").read_text(encoding="utf-8"))
    folder = kept / report.model.family
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    pictures = [path for what, path in report.files.items() if what in PICTURES or what.startswith("overlay-")]
    for name in ("report.json", *pictures):
        shutil.copyfile(source / name, folder / name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, nargs="?", help="folder of a finished `quota demo` to take figures and pictures from")
    source = parser.parse_args().demo
    if source is not None:
        print(f"kept {keep(source)}")
    atomic_write_text(README, fill(README.read_text(encoding="utf-8"), blocks()))
    print(f"filled {README}")


if __name__ == "__main__":
    main()
