"""`quota calibrate`: float checkpoint + samples -> quantized checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quota.calib.settings import DEFAULTS, METHODS, WORDS, Settings
from quota.cli.shell import FloatType, JsonOption, check_checkpoint, check_writable, print_json, say
from quota.core.errors import UsageError
from quota.core.formats import SCHEMES


def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Float checkpoint (LLaVA, Qwen-VL): a folder or a hub name.")
    ],
    out: Annotated[
        Path, typer.Option("--out", help="New or empty folder to write. It appears only when it is complete.")
    ],
    samples: Annotated[
        Path | None,
        typer.Option("--samples", help="Calibration samples, a JSON file (see below). Not needed by --method rtn."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", help=WORDS["method"] + " Left out: the first of --scheme, or flatquant.", show_default=False
        ),
    ] = None,
    scheme: Annotated[str | None, typer.Option("--scheme", help=WORDS["scheme"])] = DEFAULTS.scheme,
    modules: Annotated[str, typer.Option("--modules", help=WORDS["modules"])] = ",".join(DEFAULTS.modules),
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Calibrate on the graph this recipe prunes (prune, then quantize).")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=0, help=WORDS["steps"])] = DEFAULTS.steps,
    seed: Annotated[int, typer.Option("--seed", help=WORDS["seed"])] = DEFAULTS.seed,
    device: Annotated[str, typer.Option("--device", help=WORDS["device"])] = DEFAULTS.device,
    dtype: Annotated[FloatType, typer.Option("--dtype", help=WORDS["dtype"])] = FloatType(DEFAULTS.dtype),
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Continue a killed calibration from `OUT.partial`, or start again.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a quantized checkpoint at OUT, or discard another OUT.partial.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Only say what it takes: tokens, blocks, memory, disk and an estimate of the time. MODEL may lack its"
            " weights then, and the machine the GPU of --device.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Quantize a float checkpoint, by default to 4-bit weights, activations and KV cache.

    Works block by block, streamed from the checkpoint: memory is bounded by one block, or by 2 GiB of small ones that
    learn side by side. For each block it learns transforms and clipping thresholds that keep the block's output close
    to the float block's (FlatQuant). Killed in the middle, the same command continues; a damaged file of OUT.partial is
    computed again. OUT is refused before the work when it holds anything but the result of this very command.

    With `--device cuda` blocks are learned on a GPU, one at a time; samples and what they become between blocks stay on
    the host, in memory and in OUT.partial. A calibration is continued on the kind of device, and in the dtype, that it
    was begun with.

    `--method gptq` and `--method awq` alone quantize weights, in groups of 128 inputs (W4A16): activations
    and output head stay float, the cache is float16. With `--scheme w4a16kv4` the cache has four bits too.
    `--method rtn` rounds them to nearest, the baseline of both.

    `--scheme w8a8` makes int8 weights and activations (gptq, rtn), `fp8`, `nvfp4` and `mxfp4` small floats (rtn).

    **Examples**

        quota calibrate llava-hf/llava-1.5-7b-hf --samples samples.json --out llava-w4a4kv4

        quota calibrate llava-hf/llava-1.5-7b-hf --samples samples.json --out llava-w4a4kv4 --plan

        quota calibrate llava-hf/llava-1.5-7b-hf --samples samples.json --out llava-w4a4kv4 --device cuda

        quota calibrate ./llava --samples samples.json --modules llm --out llava-llm-only

        quota calibrate ./llava --samples samples.json --method gptq --out llava-gptq-w4a16

    **Samples file**

        {"schema": "quota-samples/1", "samples": [{"id": "a", "image": "images/a.jpg", "instruction": "what is this?",
        "answer": "a cat", "task": "name"}]}

    Image paths are relative to the file; without `image` a sample is text only. `answer` and `task` are optional: the
    answer is read after the instruction, the task groups the accuracies of `quota eval --samples`. 128 samples are
    plenty; `quota samples build` makes a file from public data.
    """
    if method is None:
        method = SCHEMES[scheme].methods[0] if scheme in SCHEMES else DEFAULTS.method
    try:
        settings = Settings(
            method=method,
            scheme=scheme,
            modules=_names(modules),
            seed=seed,
            steps=steps,
            device=device,
            dtype=dtype.value,
        )
    except UsageError as error:  # begins with the field, which is the option
        raise UsageError(f"--{error}") from None
    if samples is None and METHODS[method].samples:
        raise UsageError(
            f"--samples: method {method} learns from samples; give a samples file (only rtn rounds without)"
        )
    check_checkpoint(model, "MODEL")
    check_writable(out)

    from quota.calib.run import calibrate as calibrate_model
    from quota.calib.run import plan_calibration
    from quota.calib.samples import Samples
    from quota.core.recipe import Recipe

    read = None if samples is None else Samples.load(samples)
    pruned = Recipe.load(recipe) if recipe else None
    if plan:
        takes = plan_calibration(
            model, read, out=out, settings=settings, recipe=pruned, resume=resume, overwrite=overwrite
        )
        print_json(takes.to_dict()) if json else say("\n".join(takes.lines()))
        return
    report = calibrate_model(
        model,
        read,
        out=out,
        settings=settings,
        recipe=pruned,
        progress=not json,
        resume=resume,
        overwrite=overwrite,
    )
    if json:
        print_json(report.to_dict())
        return
    say(f"{out}: {method}, {report.regime}, parts {', '.join(settings.modules)}, {report.seconds:.0f} s")
    if read is None:
        return
    say(f"{'block':<36}  {'mse, rounded':>12}  {'calibrated':>12}  {'SQNR dB':>8}")
    for block in report.blocks:
        say(f"{block['name']:<36}  {block['mse_rtn']:>12.4g}  {block['mse']:>12.4g}  {block['sqnr_db']:>8.2f}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
