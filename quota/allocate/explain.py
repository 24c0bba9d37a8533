"""What a recipe does, in rows, totals and words; and where two recipes differ. The command line prints what these
return."""

from __future__ import annotations

from typing import Any

from quota.allocate.compute import Cost, DecoderSizes, cost
from quota.core.methods import METHODS
from quota.core.recipe import Recipe
from quota.core.selection import Selection
from quota.core.selectors import POLICIES, SCORES


def layer_rows(recipe: Recipe) -> list[dict[str, Any]]:
    """One row per decoder layer: layer, candidate, keep, tokens, drop (share dropped at its input), sensitivity (None
    if unknown)."""
    known = dict(zip(recipe.candidates, recipe.sensitivities, strict=True)) if recipe.sensitivities else {}
    rows, alive = [], 1.0
    for layer in range(recipe.model.layers):
        keep = recipe.keep_at(layer)
        rows.append(
            {
                "layer": layer,
                "candidate": layer in recipe.candidates,
                "keep": keep,
                "tokens": recipe.tokens_at(layer),
                "drop": round(alive - keep, 6),
                "sensitivity": known.get(layer),
            }
        )
        alive = keep
    return rows


def recipe_cost(recipe: Recipe) -> Cost | None:
    """Equations (10)-(13) for one image of reference size; None where the recipe lacks the model's sizes."""
    model = recipe.model
    if model.hidden_size is None or model.kv_size is None or model.intermediate_size is None:
        return None
    sizes = DecoderSizes(model.layers, model.hidden_size, model.kv_size, model.intermediate_size)
    tokens = [recipe.tokens_at(layer) for layer in range(model.layers)]
    return cost(
        tokens, recipe.reference_tokens, model.text_tokens or 0, sizes, model.vision_macs or 0, model.head_dim or 64
    )


def facts(recipe: Recipe) -> dict[str, Any]:
    """Totals of a recipe. The compute ratios and KV bytes are None where the recipe lacks the model's sizes."""
    tokens = [recipe.tokens_at(layer) for layer in range(recipe.model.layers)]
    spent = recipe_cost(recipe)
    return {
        "method": recipe.method,
        "regime": recipe.regime,
        "architecture": recipe.model.architecture,
        "fingerprint": recipe.model.fingerprint,
        "candidates": list(recipe.candidates),
        "layer_rule": recipe.provenance.layer_rule,
        "tau": recipe.tau,
        "reference": recipe.reference,
        "reference_tokens": recipe.reference_tokens,
        "final_keep": recipe.final_keep,
        "final_tokens": tokens[-1],
        "average_visual_tokens": round(sum(tokens) / len(tokens), 3),
        "average_keep": round(sum(tokens) / len(tokens) / recipe.reference_tokens, 6),
        "compute_ratio": None if spent is None or recipe.model.vision_macs is None else round(spent.ratio, 6),
        "compute_ratio_language": None if spent is None else round(spent.ratio_language, 6),
        "compute_ratio_visual": None if spent is None else round(spent.ratio_visual, 6),
        "text_tokens": recipe.model.text_tokens,
        "kv_bytes": None if spent is None else spent.kv_bytes,
        "kv_bytes_unpruned": None if spent is None else spent.kv_bytes_unpruned,
        "position_policy": recipe.position_policy,
        "weights": recipe.weights.model_dump(),
        "selections": [selection.model_dump() for selection in recipe.selections],
        "seed": recipe.seed,
        "provenance": recipe.provenance.model_dump(),
    }


def explain(recipe: Recipe) -> dict[str, Any]:
    """`facts` plus `layers`, the rows: what `quota recipe explain --json` prints."""
    return {**facts(recipe), "layers": layer_rows(recipe)}


def explain_text(recipe: Recipe) -> str:
    """The same as text: a few sentences and one line per layer with a bar of the tokens alive."""
    f = facts(recipe)
    lines = [
        f"{f['method']} recipe for {f['architecture']} ({f['fingerprint'][:19]}), regime {f['regime']}",
        _where(recipe),
        (
            f"Of {f['reference_tokens']} visual tokens per image {f['final_tokens']} ({f['final_keep']:.4g}) reach"
            f" the end; {f['average_visual_tokens']:.1f} ({f['average_keep']:.4g}) on average over"
            f" {recipe.model.layers} layers."
        ),
    ]
    if f["compute_ratio_language"] is not None:
        whole = "" if f["compute_ratio"] is None else f"{f['compute_ratio']:.1%} of the whole model's, "
        lines.append(
            f"Prefill multiply-accumulates: {whole}{f['compute_ratio_language']:.1%} of the language model's"
            + (f" at {f['text_tokens']} text tokens" if f["text_tokens"] else " for the visual tokens")
            + f"; 4-bit KV cache {f['kv_bytes'] / 1e3:.1f} kB instead of {f['kv_bytes_unpruned'] / 1e3:.1f} kB."
        )
    lines += [
        *_choices(recipe),
        f"Positions: {f['position_policy']}.",
        *(f"Search: {found}." for found in recipe.provenance.search),
        "",
    ]
    lines.append(f"{'layer':>5}  {'tokens':>6}  {'keep':>6}  {'drop':>6}  {'sensitivity':>11}")
    for row in layer_rows(recipe):
        drop = f"{row['drop']:.4f}" if row["candidate"] else ""
        s = "" if row["sensitivity"] is None else f"{row['sensitivity']:.4g}"
        bar = "█" * max(1, round(24 * row["keep"])) if row["keep"] else ""
        lines.append(f"{row['layer']:>5}  {row['tokens']:>6}  {row['keep']:>6.4f}  {drop:>6}  {s:>11}  {bar}")
    return "\n".join(lines)


def _where(recipe: Recipe) -> str:
    inside = [c for c in recipe.candidates if c]
    if len(inside) == len(recipe.candidates):
        place = f"Layers {compact_layers(inside)} drop visual tokens"
    else:
        place = "Visual tokens are dropped before the language model" + (
            f" and at layers {compact_layers(inside)}" if inside else ""
        )
    row = METHODS.get(recipe.method)
    if row is None or not row.drops:
        return f"{place}."
    told = "" if row.parameter is None else f" ({row.parameter} {getattr(recipe, row.parameter):g})"
    return f"{place} {row.drops}{told}."


def _choices(recipe: Recipe) -> list[str]:
    """One sentence per way of choosing, with the candidates that choose so."""
    groups: dict[Selection, list[int]] = {}
    for candidate in recipe.candidates:
        groups.setdefault(recipe.selection_at(candidate), []).append(candidate)
    out = []
    for selection, candidates in groups.items():
        at = "" if len(groups) == 1 else f"At {compact_layers(candidates)}: "
        out.append(f"{at}{_sentence(recipe, selection)}.")
    return out


def _sentence(recipe: Recipe, selection: Selection) -> str:
    if recipe.final_keep == 0:
        return "No visual token stays"
    score, policy = SCORES[selection.score], POLICIES[selection.policy]
    chosen = f"Tokens are chosen {policy.words}"
    if policy.parameter is not None:
        chosen += f" ({policy.parameter} {getattr(selection, policy.parameter):g})"
    if not policy.uses_score:
        return chosen
    weighed = ""
    if "weights" in score.needs:
        parts = (f"{weight:.3g} {name}" for name, weight in recipe.weights.model_dump().items() if weight)
        weighed = f" ({', '.join(parts)})"
    return f"{chosen}; score: {score.words}{weighed}"


def compact_layers(layers: tuple[int, ...] | list[int]) -> str:
    """[2, 3, 4, 7] -> "2-4,7", the text `parse_layers` reads back."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def diff(first: Recipe, second: Recipe) -> list[dict[str, Any]]:
    """Fields that differ: [{"field", "first", "second"}], in schema order; None where one side lacks the entry."""
    a, b = (flatten(r.model_dump(mode="json")) for r in (first, second))
    return [
        {"field": k, "first": a.get(k), "second": b.get(k)} for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)
    ]


def diff_text(first: Recipe, second: Recipe) -> str:
    """One line per differing field, or "the same"."""
    changes = diff(first, second)
    if not changes:
        return "the same"
    width = max(len(c["field"]) for c in changes)
    shown = ["-" if v is None else str(v) for c in changes for v in (c["first"], c["second"])]
    return "\n".join(f"{c['field']:<{width}}  {shown[2 * i]} -> {shown[2 * i + 1]}" for i, c in enumerate(changes))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b[0]": 1}"""
    if isinstance(value, dict) and value:
        return {
            k: v
            for key, inner in value.items()
            for k, v in flatten(inner, f"{prefix}.{key}" if prefix else key).items()
        }
    if isinstance(value, list) and value:
        return {k: v for i, inner in enumerate(value) for k, v in flatten(inner, f"{prefix}[{i}]").items()}
    return {prefix: value}
