"""`quota recipe` and its verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quota.cli.shell import (
    BuildByDefaultGroup, JsonOption, check_checkpoint, check_keep, check_output, notes, parse_layers, print_json, say,
)  # fmt: skip
from quota.core.errors import RecipeError, UsageError

METHODS = ("quota", "uniform")
REFERENCES = ("recorded", "per_image")
POLICIES = ("original", "compact")

app = typer.Typer(cls=BuildByDefaultGroup, no_args_is_help=True, rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]})


@app.callback()
def about() -> None:
    """Make and read recipes: how many visual tokens each layer keeps.

    `quota recipe CHECKPOINT --model MODEL --samples FILE --keep 0.3 --out FILE` makes one (options: `quota recipe build --help`).

    **Examples**

        quota recipe demo-out/quantized --model ./float --samples samples.json --keep 0.3 --out recipe.json

        quota recipe explain recipe.json

        quota recipe validate recipes/*.json

        quota recipe diff a.json b.json
    """


@app.command("build")
def build(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Quantized checkpoint made by `quota calibrate`.")],
    model: Annotated[str, typer.Option("--model", help="The float model it was made from.")],
    samples: Annotated[Path, typer.Option("--samples", help="Calibration samples, the same file as for `quota calibrate`.")],
    out: Annotated[Path, typer.Option("--out", help="Recipe file to write.")],
    keep: Annotated[float, typer.Option("--keep", help="Share of visual tokens alive after the last pruning layer, above 0 and at most 1.")] = 0.3,
    layers: Annotated[str | None, typer.Option("--layers", help="Pruning layers such as 2-6 or 2,4,6. Default: chosen from the profile.")] = None,
    tau: Annotated[float, typer.Option("--tau", help="Softmax temperature: small spends the drops on the least sensitive layers.")] = 1.0,
    method: Annotated[str, typer.Option("--method", help="quota: by sensitivity; uniform: equal drops, no quantization term in the score.")] = "quota",
    reference: Annotated[str, typer.Option("--reference", help="recorded: budgets count the model's picture size; per_image: each prompt's own.")] = "recorded",
    position_policy: Annotated[str, typer.Option("--position-policy", help="original: kept tokens keep their positions; compact: renumbered.")] = "original",
    plot: Annotated[Path | None, typer.Option("--plot", help="Also write the layer profile as PNG.")] = None,
    json: JsonOption = False,
) -> None:
    """Profile a float model and its quantized checkpoint, then allocate the drops (this is what `quota recipe CHECKPOINT ...` runs).

    **Examples**

        quota recipe demo-out/quantized --model ./float --samples samples.json --keep 0.3 --out recipe.json

        quota recipe demo-out/quantized --model ./float --samples samples.json --keep 0.2 --layers 2-6 --tau 0.5 --out recipe.json
    """
    check_keep(keep)
    chosen = parse_layers(layers)
    if not tau > 0:
        raise UsageError(f"--tau: expected a temperature above 0, got {tau:g}")
    for option, value, allowed in (("--method", method, METHODS), ("--reference", reference, REFERENCES), ("--position-policy", position_policy, POLICIES)):
        if value not in allowed:
            raise UsageError(f"{option}: expected one of {', '.join(allowed)}, got {value!r}")
    check_checkpoint(checkpoint)
    check_checkpoint(model, "--model")
    check_output(out)
    if plot is not None:
        check_output(plot, "--plot")

    from quota.eval.profiling import allocate, profile_models

    profile = profile_models(model, checkpoint, samples, quiet=json)
    recipe = allocate(profile, keep=keep, layers=chosen, tau=tau, method=method, reference=reference, position_policy=position_policy)
    recipe.save(out)
    if plot is not None:
        from quota.report.plots import save_profile_plot

        save_profile_plot(plot, profile, recipe)
    if json:
        print_json(recipe.model_dump(mode="json"))
        return
    _explain(recipe, out)


@app.command("explain")
def explain(file: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe file.")], json: JsonOption = False) -> None:
    """Say in words and numbers what a recipe does: per layer, and what it costs.

    **Example**

        quota recipe explain demo-out/recipe.json
    """
    from quota.core.recipe import Recipe

    recipe = Recipe.load(file)
    if json:
        print_json({**facts(recipe), "layers": layer_rows(recipe)})
        return
    _explain(recipe, file)


def layer_rows(recipe: Any) -> list[dict[str, Any]]:
    """One row per decoder layer: tokens alive, share dropped here, sensitivity where the layer is a candidate."""
    rows, alive = [], 1.0
    index = {layer: i for i, layer in enumerate(recipe.candidates)}
    for layer in range(recipe.model.layers):
        keep = recipe.keep_at(layer)
        row = {"layer": layer, "candidate": layer in index, "keep": keep, "tokens": recipe.tokens_at(layer), "drop": round(alive - keep, 6)}
        row["sensitivity"] = recipe.sensitivities[index[layer]] if layer in index and recipe.sensitivities else None
        rows.append(row)
        alive = keep
    return rows


def facts(recipe: Any) -> dict[str, Any]:
    """Totals of a recipe; `compute_ratio` is null where the recipe lacks the model's sizes."""
    rows = layer_rows(recipe)
    return {
        "method": recipe.method, "regime": recipe.regime, "architecture": recipe.model.architecture, "fingerprint": recipe.model.fingerprint,
        "reference_tokens": recipe.reference_tokens, "final_keep": recipe.final_keep, "final_tokens": rows[-1]["tokens"], "tau": recipe.tau,
        "average_visual_tokens": sum(r["tokens"] for r in rows) / len(rows), "position_policy": recipe.position_policy,
        "weights": recipe.weights.model_dump(),
    }  # fmt: skip


def _explain(recipe: Any, source: Path) -> None:
    total = facts(recipe)
    say(f"{source}: {total['method']} recipe for {total['architecture']} ({total['fingerprint'][:19]}...), {total['regime']}")
    say(
        f"of {total['reference_tokens']} visual tokens per picture {total['final_tokens']} ({total['final_keep']:.0%}) reach the end, "
        f"{total['average_visual_tokens']:.1f} on average over {recipe.model.layers} layers"
    )
    say("tokens are ranked by " + ", ".join(f"{v:.2g} {k}" for k, v in total["weights"].items() if v) + f"; positions: {total['position_policy']}")
    say(f"{'layer':>5}  {'tokens':>6}  {'keep':>6}  {'drop':>6}  sensitivity")
    for row in layer_rows(recipe):
        sensitivity = f"{row['sensitivity']:.4g}" if row["sensitivity"] is not None else ("-" if row["candidate"] else "")
        drop = f"{row['drop']:.3f}" if row["candidate"] else ""
        say(f"{row['layer']:>5}  {row['tokens']:>6}  {row['keep']:>6.3f}  {drop:>6}  {sensitivity}".rstrip())


@app.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recipe files.")],
    model: Annotated[str | None, typer.Option("--model", help="Also check that they belong to this model (folder or hub name).")] = None,
    json: JsonOption = False,
) -> None:
    """Check recipe files; every wrong field is named. Exit status 1 when any is wrong.

    **Example**

        quota recipe validate recipes/*.json --model ./float
    """
    from quota.core.recipe import Recipe

    fingerprint = _fingerprint_of(model) if model is not None else None
    results: list[dict[str, Any]] = []
    for file in files:
        try:
            recipe = Recipe.load(file)
            if fingerprint is not None:
                recipe.check_model(fingerprint)
            results.append({"file": str(file), "valid": True, "error": None})
        except RecipeError as error:
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


def _fingerprint_of(model: str) -> str:
    from quota.arch.llava import model_fingerprint
    from quota.eval.asking import load_model

    check_checkpoint(model, "--model")
    return model_fingerprint(load_model(model, None)[0])


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
    from quota.core.recipe import Recipe

    a, b = (flatten(Recipe.load(path).model_dump(mode="json")) for path in (first, second))
    changes = [{"field": k, "first": a.get(k), "second": b.get(k)} for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
    if json:
        print_json(changes)
    elif not changes:
        say("the same")
    else:
        width = max(len(c["field"]) for c in changes)
        for c in changes:
            say(f"{c['field']:<{width}}  {c['first']} -> {c['second']}")
    if changes and exit_code:
        raise typer.Exit(1)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b[0]": 1}"""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{prefix}.{key}" if prefix else key).items()}
    if isinstance(value, list) and value:
        return {k: v for i, inner in enumerate(value) for k, v in flatten(inner, f"{prefix}[{i}]").items()}
    return {prefix: value}
