"""`quota calibrate`: float checkpoint + samples -> quantized checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quota.calib.settings import METHODS
from quota.cli.shell import JsonOption, check_checkpoint, check_writable, print_json, say
from quota.core.errors import UsageError
from quota.core.formats import MODULES, SCHEMES, scheme_made_by


def parse_modules(text: str) -> tuple[str, ...]:
    """`vision,llm` -> ("vision", "llm") in the model's order; UsageError names an unknown or missing part."""
    asked = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in asked if part not in MODULES]
    if wrong or not asked:
        raise UsageError(f"--modules: expected a comma separated list of {', '.join(MODULES)}, got {text!r}")
    return tuple(m for m in MODULES if m in asked)


def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Float checkpoint (LLaVA-1.5, Qwen2.5-VL): a folder or a hub name.")
    ],
    out: Annotated[
        Path, typer.Option("--out", help="New or empty folder to write. It appears only when it is complete.")
    ],
    samples: Annotated[
        Path | None,
        typer.Option("--samples", help="Calibration samples, a JSON file (see below). Not needed by --method rtn."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help=" ".join(f"{row.name} ({row.words()}): {', '.join(row.methods)}." for row in SCHEMES.values()),
        ),
    ] = "flatquant",
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", help="What is quantized, of what the method makes. Default: the first listed above."),
    ] = None,
    modules: Annotated[
        str, typer.Option("--modules", help="Which parts to quantize; the others stay float.")
    ] = "vision,projector,llm",
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Calibrate on the graph this recipe prunes (prune, then quantize).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=0, help="Steps per block (flatquant). 0: the searched start alone.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same checkpoint.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Continue a killed calibration from `OUT.partial`, or start again.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a quantized checkpoint at OUT, or discard another OUT.partial.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Only say what it takes: tokens, blocks, memory, disk and an estimate of the time."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Quantize a float checkpoint: 4-bit weights, activations and KV cache, weights alone, or weights and KV cache.

    Works block by block, streamed from the checkpoint: memory is bounded by one block. For each block it learns
    transforms and clipping thresholds that keep the block's output close to the float block's (FlatQuant). Killed in
    the middle, the same command continues; a damaged file of OUT.partial is computed again. OUT is refused before the
    work when it holds anything but the result of this very command.

    `--method gptq` and `--method awq` quantize weights alone, in groups of 128 inputs (W4A16): activations, KV cache
    and output head stay float. With `--scheme w4a16kv4` the cache has four bits too, and `quota serve` takes the
    result.
    `--method rtn` rounds them to nearest, the baseline of both.

    **Examples**

        quota calibrate llava-hf/llava-1.5-7b-hf --samples samples.json --out llava-w4a4kv4

        quota calibrate llava-hf/llava-1.5-7b-hf --samples samples.json --out llava-w4a4kv4 --plan

        quota calibrate ./llava --samples samples.json --modules llm --out llava-llm-only

        quota calibrate ./llava --samples samples.json --method gptq --out llava-gptq-w4a16

    **Samples file**

        {"schema": "quota-samples/1", "samples": [{"id": "a", "image": "images/a.jpg", "instruction": "what is this?",
        "answer": "a cat", "task": "name"}]}

    Image paths are relative to the file; without `image` a sample is text only. `answer` and `task` are optional: the
    answer is read after the instruction, the task groups the accuracies of `quota eval --samples`. 128 samples are
    plenty; `quota samples build` makes a file from public data.
    """
    if method not in METHODS:
        raise UsageError(f"--method: expected one of {', '.join(METHODS)}, got {method!r}")
    if steps is not None and not METHODS[method].learns:
        learners = ", ".join(name for name, row in METHODS.items() if row.learns)
        raise UsageError(f"--steps: only {learners} learns in steps; leave it out with --method {method}")
    try:
        scheme_made_by(method, scheme)
    except ValueError as error:
        raise UsageError(f"--scheme: {error}; leave it out, or choose another --method") from None
    if samples is None and METHODS[method].samples:
        raise UsageError(
            f"--samples: method {method} learns from samples; give a samples file (only rtn rounds without)"
        )
    chosen = parse_modules(modules)
    check_checkpoint(model, "MODEL")
    check_writable(out)

    from quota.calib.run import Options, plan_calibration
    from quota.calib.run import calibrate as calibrate_model
    from quota.calib.samples import Samples
    from quota.core.recipe import Recipe

    read = None if samples is None else Samples.load(samples)
    options: Options = {
        "method": method,
        "scheme": scheme,
        "modules": chosen,
        "seed": seed,
        "steps": steps,
        "recipe": Recipe.load(recipe) if recipe else None,
        "progress": not json,
        "resume": resume,
        "overwrite": overwrite,
    }
    if plan:
        takes = plan_calibration(model, read, out=out, **options)
        print_json(takes.to_dict()) if json else say("\n".join(takes.lines()))
        return
    report = calibrate_model(model, read, out=out, **options)
    if json:
        print_json(report.to_dict())
        return
    say(f"{out}: {method}, {report.regime}, parts {', '.join(chosen)}, {report.seconds:.0f} s")
    if read is None:
        return
    say(f"{'block':<36}  {'mse, rounded':>12}  {'calibrated':>12}  {'SQNR dB':>8}")
    for block in report.blocks:
        say(f"{block['name']:<36}  {block['mse_rtn']:>12.4g}  {block['mse']:>12.4g}  {block['sqnr_db']:>8.2f}")
