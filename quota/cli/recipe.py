"""`quota recipe` and its verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quota.cli.shell import (
    BuildByDefaultGroup,
    DeviceOption,
    DtypeOption,
    FloatType,
    JsonOption,
    OverwriteOption,
    check_checkpoint,
    check_keep,
    check_output,
    notes,
    print_json,
    say,
)
from quota.core.errors import QuotaError, UsageError
from quota.core.keep import POSITION_POLICIES, REFERENCES
from quota.core.methods import METHODS, methods_help, withdrawing

app = typer.Typer(
    cls=BuildByDefaultGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def about() -> None:
    """Make and read recipes: how many visual tokens each layer keeps.

    `quota recipe CHECKPOINT --model MODEL --samples FILE --keep 0.3 --out FILE` makes one (options: `quota recipe build
    --help`).

    **Examples**

        quota recipe demo-out/quantized --model ./float --samples samples.json --keep 0.3 --out recipe.json

        quota recipe explain recipe.json

        quota recipe validate recipes/*.json demo-out/recipe.json

        quota recipe diff a.json b.json

        quota recipe upgrade old.json
    """


_BUILD_HELP = f"""Measure what a method needs, then plan the drops (this is what `quota recipe CHECKPOINT ...` runs).

`quota` and `uniform` profile the float `--model` beside the quantized CHECKPOINT. The published methods need CHECKPOINT
alone, quantized or float. Models run on `--device`, whole and unpruned. With `--compute` the keep ratio is found that
costs as much, so that methods can be compared at equal work.

**Methods**

{methods_help()}

**Examples**

    quota recipe demo-out/quantized --model ./float --samples samples.json --keep 0.3 --out recipe.json

    quota recipe demo-out/quantized --model ./float --samples samples.json --keep 0.2 --layers 2-6 --out recipe.json

    quota recipe ./float --method fastv --samples samples.json --keep 0.5 --out fastv.json

    quota recipe demo-out/quantized --method divprune --compute 0.4 --samples samples.json --out divprune.json
"""


def _told(words: dict[str, str]) -> str:
    return "; ".join(f"{name}: {meaning}" for name, meaning in words.items()) + "."


@app.command("build", help=_BUILD_HELP)
def build(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="Checkpoint the recipe is for: made by `quota calibrate`, or float."),
    ],
    samples: Annotated[
        Path, typer.Option("--samples", help="Calibration samples, the same file as for `quota calibrate`.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Recipe file to write.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="The float model CHECKPOINT was made from (methods quota and uniform)."),
    ] = None,
    method: Annotated[str, typer.Option("--method", help=f"One of {', '.join(METHODS)}; see above.")] = "quota",
    keep: Annotated[
        float | None,
        typer.Option("--keep", help="Share of visual tokens, above 0 and at most 1. Default: the method's."),
    ] = None,
    compute: Annotated[
        float | None,
        typer.Option("--compute", help="Instead of --keep: language-model compute against unpruned, text included."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Pruning layers such as 2-6 or 2,4,6. Default: the method's.")
    ] = None,
    tau: Annotated[
        float,
        typer.Option("--tau", help="quota: softmax temperature; small spends the drops on the least sensitive layers."),
    ] = 1.0,
    threshold: Annotated[
        float, typer.Option("--threshold", help="vtw: largest mean KL divergence, in nats, that counts as unchanged.")
    ] = 0.003,
    seed: Annotated[int, typer.Option("--seed", min=0, help="random: which tokens.")] = 0,
    reference: Annotated[
        str,
        typer.Option("--reference", help=_told(REFERENCES)),
    ] = "recorded",
    position_policy: Annotated[str, typer.Option("--position-policy", help=_told(POSITION_POLICIES))] = "original",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also write the layer profile as PNG (methods quota and uniform).")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = FloatType.float32,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    from quota.allocate.candidates import parse_layers

    for option, value, allowed in (
        ("--method", method, tuple(METHODS)),
        ("--reference", reference, tuple(REFERENCES)),
        ("--position-policy", position_policy, tuple(POSITION_POLICIES)),
    ):
        if value not in allowed:
            raise UsageError(f"{option}: expected one of {', '.join(allowed)}, got {value!r}")
    if keep is not None:
        check_keep(keep)
    if compute is not None and (keep is not None or not 0 < compute <= 1 or METHODS[method].withdraws):
        raise UsageError(
            f"--compute: expected a share above 0 and at most 1, without --keep and not with {withdrawing()}, got"
            f" {compute:g}"
        )
    if layers is not None:
        parse_layers(layers, 1_000_000)  # the spelling; the model's own number of layers is checked when it is known
    if not tau > 0:
        raise UsageError(f"--tau: expected a temperature above 0, got {tau:g}")
    profiled = METHODS[method].search == "profile"
    if profiled and model is None:
        raise UsageError(
            f"--model: method {method} measures the float model beside the quantized one; give the folder or hub name"
        )
    if plot is not None and not profiled:
        raise UsageError(f"--plot: {method} profiles no layers; leave it out")
    check_checkpoint(checkpoint)
    if model is not None:
        check_checkpoint(model, "--model")
    check_output(out, overwrite=overwrite)
    if plot is not None:
        check_output(plot, "--plot", overwrite=overwrite)

    from quota.allocate.explain import explain_text
    from quota.core.devices import checked_device
    from quota.planning.request import RecipeRequest, profile_models
    from quota.runtime.load import Placement

    place = Placement(device, dtype.value)
    checked_device(device)
    how = RecipeRequest(method, keep, compute, layers, tau, reference, position_policy)
    if profiled:
        profile = profile_models(str(model), checkpoint, samples, place=place, quiet=json)
        recipe = how.from_profile(profile)
        if plot is not None:
            from quota.report.plots import save_profile_plot

            save_profile_plot(plot, profile, recipe)
    else:
        recipe = how.from_checkpoint(checkpoint, samples, place=place, seed=seed, threshold=threshold, quiet=json)
    recipe.save(out)
    if json:
        print_json(recipe.model_dump(mode="json"))
        return
    say(f"{out}\n{explain_text(recipe)}")


@app.command("explain")
def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe file.")], json: JsonOption = False
) -> None:
    """Say in words and numbers what a recipe does: per layer, and what it costs.

    **Example**

        quota recipe explain demo-out/recipe.json
    """
    from quota.allocate import explain as explained
    from quota.core.recipe import Recipe

    recipe = Recipe.load(file)
    if json:
        print_json(explained.explain(recipe))
        return
    say(explained.explain_text(recipe))


@app.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recipe files.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Also check that this model (folder or hub name) takes them.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check recipe files; every wrong field is named. Exit status 1 when any is wrong.

    The schema that lies beside them in `recipes/` is no recipe: it is right when it is this version's.

    **Example**

        quota recipe validate recipes/*.json

        quota recipe validate demo-out/recipe.json --model quota/scenes/assets/checkpoint
    """
    from quota.core.recipe import Recipe, is_schema

    opened = None if model is None else _opened(model)
    results: list[dict[str, Any]] = []
    for file in files:
        try:
            if is_schema(file):
                results.append({"file": str(file), "valid": True, "error": None})
                continue
            recipe = Recipe.load(file)
            if opened is not None:
                from quota.runtime.patch import patched

                patched(opened, recipe).undo()  # whatever loading refuses, by loading
            results.append({"file": str(file), "valid": True, "error": None})
        except QuotaError as error:
            results.append({"file": str(file), "valid": False, "error": " ".join(str(error).split())})
    if json:
        print_json(results)
    else:
        for result in results:
            if result["valid"]:
                say(f"ok     {result['file']}")
            else:
                notes().print(f"wrong  {result['error']}", markup=False, highlight=False, soft_wrap=True)
    if not all(r["valid"] for r in results):
        raise typer.Exit(1)


def _opened(model: str) -> Any:
    from quota.runtime.load import load_model

    check_checkpoint(model, "--model")
    return load_model(model, None)[0]


@app.command("diff")
def diff(
    first: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe file.")],
    second: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe file.")],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit status 1 when they differ.")] = False,
    json: JsonOption = False,
) -> None:
    """Field by field, what differs between two recipes.

    **Example**

        quota recipe diff recipe-30.json recipe-20.json
    """
    from quota.allocate import explain as explained
    from quota.core.recipe import Recipe

    a, b = Recipe.load(first), Recipe.load(second)
    changes = explained.diff(a, b)
    if json:
        print_json(changes)
    else:
        say(explained.diff_text(a, b))
    if changes and exit_code:
        raise typer.Exit(1)


@app.command("upgrade")
def upgrade(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recipe files.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write instead of FILE itself; for one FILE.")
    ] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Rewrite recipes of schema_version 1 as this version's, and say what changed.

    What they do stays the same: candidate -1, before the language model, is candidate 0 now. All are read and checked
    before the first is written; files of this version, and the schema beside them, are left alone.

    **Example**

        quota recipe upgrade recipe.json old/*.json

        quota recipe upgrade old.json --out recipe.json
    """
    from quota.core.recipe import is_schema
    from quota.core.recipe_upgrade import upgrade as read

    if out is not None:
        if len(files) != 1:
            raise UsageError(f"--out: expected one FILE to write there, got {len(files)}")
        check_output(out, overwrite=overwrite)
    upgrades = [read(file) for file in files if not is_schema(file)]
    written = [(found, out or found.path.resolve()) for found in upgrades if found.changes or out is not None]
    for _, target in written:
        check_output(target, overwrite=True)
    for found, target in written:
        found.recipe.save(target)
    results = [{"file": str(out or found.path), "changes": list(found.changes)} for found in upgrades]
    if json:
        print_json(results)
        return
    for result in results:
        say(f"{result['file']}: {'; '.join(result['changes']) or 'of this version already'}")
