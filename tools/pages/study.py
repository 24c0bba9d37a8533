"""The pages docs/tables/FAMILY.md and the block `tables` of docs/results.md, from the reports kept in docs/tables
only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from quota.core.errors import UsageError
from quota.demo.embedded import FAMILIES
from quota.models import family_class
from quota.report.table import markdown_table
from quota.study.layers import profile_markdown, show_markdown
from quota.study.render import differences, markdown
from quota.study.results import StudyReport, StudyRow
from quota.study.run import STUDIES
from quota.study.tables import ORDERS

RESULTS = Path("docs/results.md")
KEPT = Path("docs/tables")
SHOWN = ("modules", "keep", "pipelines")
FOLDED = ("compute", "weights", "formats", "runtime")  # behind a click


def keep(source: Path, kept: Path = KEPT) -> list[Path]:
    """Copy every report in a study folder, with its figures, to its family's folder. UsageError when there is none."""
    out = []
    for path in (source / f"{name}.json" for name in STUDIES):
        if path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            folder = kept / report["family"]
            folder.mkdir(parents=True, exist_ok=True)
            figures = (
                [report["files"]["plot"]]
                if "plot" in report["files"]
                else [a["overlay"] for a in report["methods"].values()]
            )
            for name in (path.name, *figures):
                shutil.copyfile(source / name, folder / name)
            out.append(folder / path.name)
    if not out:
        raise UsageError(f"{source}: expected at least one report of `quota study` ({', '.join(STUDIES)}), found none")
    return out


def reports(family: str, kept: Path = KEPT) -> dict[str, dict[str, Any]]:
    """study -> its kept report, in the order of the studies."""
    found = {name: kept / family / f"{name}.json" for name in STUDIES}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.is_file()}


def page(family: str, kept: Path = KEPT) -> str:
    """Every kept study of one family, Markdown."""
    found = reports(family, kept)
    missing = [name for name in STUDIES if name not in found]
    parts = [
        f"# The tables on the embedded {family_class(family).title} model",
        (
            f"Written by `python -m tools.pages` from the reports in `docs/tables/{family}`; a row is one"
            f" configuration of `quota study NAME --family {family}`. The model is small and its questions are"
            " generated: the tables show which choice is better here, not how a 7B model scores."
        ),
    ]
    if missing:
        parts.append(f"Not run on this model yet: {', '.join(missing)}.")
    return "\n\n".join([*parts, *(section(name, report, family) for name, report in found.items())]).rstrip("\n") + "\n"


def pages(kept: Path = KEPT) -> dict[Path, str]:
    """Page -> text, of every family of which studies are kept."""
    return {KEPT / f"{family}.md": page(family, kept) for family in FAMILIES if reports(family, kept)}


def blocks(kept: Path = KEPT) -> dict[Path, dict[str, str]]:
    """Page -> block name -> text."""
    return {RESULTS: {"tables": block(kept)}}


def section(name: str, report: dict[str, Any], family: str) -> str:
    """One study, its headline a level up, with its figure."""
    title = f"## `{name}`: {STUDIES[name]}"
    if name == "show":
        return f"{title}\n\n{show_markdown(report, f'{family}/')}".rstrip("\n")
    text = profile_markdown(report) if name == "profile" else markdown(StudyReport.model_validate(report))
    return f"{title}\n\n{text.rstrip(chr(10))}\n\n![{STUDIES[name]}]({family}/{report['files']['plot']})"


def block(kept: Path = KEPT) -> str:
    """The part of docs/results.md: every table with the families side by side, the long ones folded, and where the rest
    is."""
    found = {family: reports(family, kept) for family in FAMILIES}
    parts = []
    for name in (*SHOWN, *FOLDED):
        by_family = {
            family: StudyReport.model_validate(known[name]) for family, known in found.items() if name in known
        }
        if by_family:
            tables = [part.rstrip("\n") for part in _tables(name, by_family)]
            if name in FOLDED:
                parts += [
                    f"<details><summary>{STUDIES[name]} (<code>quota study {name}</code>)</summary>",
                    *tables,
                    "</details>",
                ]
            else:
                parts += [f"**{STUDIES[name]}** (`quota study {name}`)", *tables]
    pages = [f"[{family_class(family).title}](tables/{family}.md)" for family, known in found.items() if known]
    parts.append(
        "All studies with accuracies per task, paired differences, layer profiles and kept tokens over images:"
        f" {', '.join(pages)}."
    )
    return "\n\n".join(parts)


def _tables(name: str, by_family: dict[str, StudyReport]) -> list[str]:
    heads = [f"{family_class(family).title} ({report.questions} questions)" for family, report in by_family.items()]
    rows = {family: {row.name: row for row in report.rows} for family, report in by_family.items()}
    names = list(dict.fromkeys(n for found in rows.values() for n in found))
    if name == "runtime":
        return [_figures_table(rows)]
    if name != "pipelines":
        with_compute = name == "compute"
        return [
            markdown_table(
                ["row", *heads],
                [[n, *(_cell(rows[f].get(n), with_compute) for f in by_family)] for n in names if n != "float"],
            )
        ]
    own = [n for n in names if ", " not in n and n != "float"]
    parts = [markdown_table(["row", *heads], [[n, *(_cell(rows[f].get(n)) for f in by_family)] for n in own])]
    methods = list(dict.fromkeys(n.split(", ")[0] for n in names if ", " in n))
    if methods:
        ran = [family for family in by_family if any(", " in n for n in rows[family])]
        columns = [f"{family_class(family).title}: {order}" for family in ran for order in ORDERS]
        parts.append("Every method at the same compute (VTW at the layer its search finds):")
        parts.append(
            markdown_table(
                ["method", *columns],
                [[m, *(_cell(rows[f].get(f"{m}, {o}")) for f in ran for o in ORDERS)] for m in methods],
            )
        )
    for family, report in by_family.items():
        said = [c for c in report.comparisons if c.row == "collaborative" and ", " not in c.against]
        parts += [
            f"{family_class(family).title}, paired differences:",
            differences(report.model_copy(update={"comparisons": said})),
        ]
        parts += ["\n".join(f"- {note}" for note in report.notes)] if report.notes else []
    return parts


def _figures_table(rows: dict[str, dict[str, StudyRow]]) -> str:
    named = {family: [row for row in found.values() if row.figures] for family, found in rows.items()}
    columns = list(dict.fromkeys(key for found in named.values() for row in found for key in row.figures))
    lines = [
        [f"{family_class(family).title} {row.name}", _cell(row), *(str(row.figures.get(key, "-")) for key in columns)]
        for family, found in named.items()
        for row in found
    ]
    return markdown_table(["row", "retention", *columns], lines)


def _cell(row: StudyRow | None, with_compute: bool = False) -> str:
    if row is None:
        return "-"
    spent = f", {100 * row.compute_ratio:.0f} % compute" if with_compute else ""
    return f"{row.retention.value:.1f} ({row.retention.low:.1f} to {row.retention.high:.1f}){spent}"
