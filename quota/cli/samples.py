"""`quota samples`: calibration samples from public data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from quota.cli.shell import JsonOption, OverwriteOption, check_output, print_json, say
from quota.core.errors import UsageError

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]}
)


@app.callback()
def about() -> None:
    """Make samples files for `quota calibrate` and `quota recipe`."""


@app.command("build")
def build(
    source: Annotated[
        list[str],
        typer.Option("--source", metavar="NAME=PATH", help="A data set and its local copy; repeat for a mixed set."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Samples file to write; images go to `<stem>_images` beside it.")],
    count: Annotated[
        int, typer.Option("--count", min=1, help="Number of samples, shared evenly over the sources.")
    ] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Same seed and copies, same samples.")] = 0,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Draw a mixed calibration set from local copies of public data sets.

    Names: **llava-mix** (conversation), **wikitext-2** (text only), **textvqa** (scene text), **docvqa** (documents),
    **chartqa** (charts). PATH is the folder of the copy, or its annotation file (JSON, text or parquet).

    **Example**

        quota samples build --source llava-mix=./llava --source wikitext-2=./wikitext --source textvqa=./textvqa
        --source docvqa=./docvqa --source chartqa="./ChartQA Dataset" --count 128 --out samples.json
    """
    pairs = []
    for text in source:
        name, mark, path = text.partition("=")
        if not mark or not path:
            raise UsageError(f"--source: expected NAME=PATH, got {text!r}")
        pairs.append((name, Path(path)))
    check_output(out, overwrite=overwrite)

    from quota.calib.sources import build_samples

    made = build_samples(pairs, count, out, seed)
    kinds = Counter(sample.task or "" for sample in made)
    if json:
        print_json({"samples": str(out), "count": len(made), "kinds": dict(kinds), "fingerprint": made.fingerprint})
        return
    say(f"{out}: {len(made)} samples ({', '.join(f'{kind} {n}' for kind, n in kinds.items())})")
