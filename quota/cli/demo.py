"""`quota demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quota.cli.shell import JsonOption, check_checkpoint, check_keep, check_output_folder, print_json


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoint, recipes, images and report.json.")] = Path(
        "demo-out"
    ),
    family: Annotated[
        str | None, typer.Option("--family", help="Embedded model: `llava` (default) or `qwen2_5_vl`.")
    ] = None,
    keep: Annotated[
        float, typer.Option("--keep", help="Share of visual tokens alive after the last pruning layer.")
    ] = 0.3,
    questions: Annotated[int, typer.Option("--questions", "-n", min=12, help="Held-out questions per row.")] = 600,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Another float checkpoint than an embedded one: a folder or a hub name."),
    ] = None,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Other calibration samples than the family's embedded ones.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=0, help="Calibration steps per block (fewer is faster and worse).")
    ] = None,
    json: JsonOption = False,
) -> None:
    """The whole path on the embedded model: calibrate, allocate, answer, evaluate.

    1. checks the float checkpoint and its 128 calibration samples
    2. calibrates W4A4KV4 (vision tower, projector, language model)
    3. profiles the layers and lets QUOTA allocate a recipe
    4. answers questions side by side and draws what was kept of their images
    5. evaluates seven configurations on held-out questions
    6. writes `report.json` (fields: docs/report.md)

    Finished stages are kept in `OUT/cache` by the content they were made from; a second run reuses them.

    **Examples**

        quota demo

        quota demo --family qwen2_5_vl --out demo-qwen

        quota demo --keep 0.1 --out demo-10
    """
    check_keep(keep)
    if model is not None:
        check_checkpoint(model, "--model")
    check_output_folder(out)

    from quota.demo.stages import DemoSettings, run_demo

    report = run_demo(
        DemoSettings(
            out=out,
            family=family,
            keep=keep,
            questions=questions,
            model=model,
            samples=samples,
            steps=steps,
            quiet=json,
        )
    )
    if json:
        print_json(report.model_dump(mode="json"))
