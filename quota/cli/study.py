"""`quota study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quota.cli.shell import (
    DeviceOption,
    DtypeOption,
    FloatType,
    JsonOption,
    check_checkpoint,
    check_keep,
    check_output_folder,
    print_json,
    say,
)
from quota.core.errors import UsageError

NAMES = ("modules", "keep", "pipelines", "compute", "weights", "formats", "runtime", "profile", "show")


def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(NAMES)}.")],
    family: Annotated[
        str | None, typer.Option("--family", help="Embedded model: `llava` (default) or `qwen2_5_vl`.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Float checkpoint, a folder or a hub name, instead of an embedded one."),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option("--tasks", help="`scenes`: held-out generated questions; or a samples file (.json) with answers."),
    ] = "scenes",
    questions: Annotated[
        int, typer.Option("--questions", "-n", min=1, help="How many questions every row answers.")
    ] = 2000,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Calibration samples. Default: the family's embedded ones.")
    ] = None,
    keep: Annotated[float, typer.Option("--keep", help="Final keep ratio where the study does not vary it.")] = 0.3,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Published methods of `pipelines` and `compute`, comma-separated; default all."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Calibration steps per block.")] = None,
    batch: Annotated[
        int,
        typer.Option("--batch", min=1, help="Questions taken at once; the engine makes batches of its own of them."),
    ] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 6,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Bootstrap resamples.")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of calibration, bootstrap and the random method.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for reports, images, recipes and the cache.")] = Path(
        "study-out"
    ),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = FloatType.float32,
    json: JsonOption = False,
) -> None:
    """Run one of the paper's tables or figures on any model.

    - `modules` which parts are quantized (Table 1)
    - `keep` QUOTA at 50 to 5 % of the visual tokens (Table 2)
    - `pipelines` joint against stage-wise quantization and pruning, and every published method in both calibration
    orders (Table 3)
    - `compute` every method at equal compute, float and W4A4KV4 (Table 4)
    - `weights` score weights: leave-one-out, each alone, the sign of the quantization term (Table 5)
    - `formats` weights alone in 4 bits (RTN, GPTQ, AWQ) beside W4A4KV4, with and without the recipe
    - `runtime` disk, peak memory, power (of the GPU too, where one answers), native against reference arithmetic (Table
    7)
    - `profile` the layers (Figures 3, 5) and `show` the kept tokens over an image (Figure 4)

    Writes NAME.md, NAME.json and NAME.png to --out. Checkpoints, searches and answers are kept in OUT/cache by the
    content they were made from: an interrupted study goes on where it stopped, and studies share them (with
    `quota demo` in the same --out too). Calibration, recipes and answers run on --device in --dtype; what another
    device or dtype has made is made again.

    **Examples**

        quota study keep

        quota study pipelines --family qwen2_5_vl --out study-qwen

        quota study pipelines --model llava-hf/llava-1.5-7b-hf --samples samples.json --tasks questions.json -n 500
        --out tables
    """
    if name not in NAMES:
        raise UsageError(f"NAME: expected one of {', '.join(NAMES)}, got {name!r}")
    check_keep(keep)
    if model is not None:
        check_checkpoint(model, "--model")
    check_output_folder(out)

    from quota.runtime.load import Placement
    from quota.study.bench import StudySettings
    from quota.study.run import run_study

    chosen = {} if methods is None else {"methods": tuple(part.strip() for part in methods.split(",") if part.strip())}
    settings = StudySettings(
        out,
        family,
        model,
        samples,
        tasks,
        questions,
        keep,
        batch=batch,
        max_new_tokens=max_new_tokens,
        steps=steps,
        seed=seed,
        resamples=resamples,
        quiet=json,
        place=Placement(device, dtype.value),
        **chosen,
    )
    report = run_study(name, settings)
    if json:
        print_json(report if isinstance(report, dict) else report.model_dump(mode="json"))
        return
    say((out / f"{name}.md").read_text(encoding="utf-8"))
