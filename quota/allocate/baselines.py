"""Published pruning methods as recipes of the same engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quota.allocate.candidates import check_layers, parse_layers
from quota.allocate.compute import DecoderSizes, layer_macs
from quota.allocate.explain import recipe_cost
from quota.allocate.fitprune import AttentionSample, search
from quota.allocate.methods import METHODS
from quota.allocate.solve import check_keep
from quota.core.errors import RecipeError, UsageError
from quota.core.keep import BEFORE, keep_of, significant
from quota.core.recipe import ModelFacts, Provenance, Recipe

FASTV_LAYER = 2
VTW_LAYER = 15 / 32  # of the depth, where nothing was searched
VTW_THRESHOLD = 0.003


@dataclass(frozen=True)
class SearchStats:
    """What a method's own search reads. withdrawal: candidate layer -> mean KL divergence of the next-token
    distribution when every visual token leaves there, over `samples` prompts; attention: FitPrune's statistics."""

    withdrawal: dict[int, float] = field(default_factory=dict)
    attention: Sequence[AttentionSample] = ()
    samples: int = 0
    threshold: float = VTW_THRESHOLD


@dataclass(frozen=True)
class RecipeContext:
    """What every recipe of one model shares."""

    model: ModelFacts
    regime: str
    provenance: Provenance = field(default_factory=Provenance)
    reference: str = "recorded"
    position_policy: str = "original"
    seed: int = 0


def build_baseline(
    basis: RecipeContext,
    method: str,
    keep: float | None = None,
    layers: str | Sequence[int] | None = None,
    evidence: SearchStats | None = None,
) -> Recipe:
    """The recipe of a published method; what `keep` means and its default are in `quota.allocate.methods`.

    layers: instead of the method's own places (FastV and VTW one layer, PyramidDrop any number; not for the others).
    RecipeError or UsageError name the option.
    """
    if method not in _BUILDERS:
        raise RecipeError(f"method: expected one of {', '.join(_BUILDERS)}, got {method!r}")
    asked = METHODS[method].keep if keep is None else keep
    if method != "vtw":
        check_keep(asked)
    elif asked:
        raise UsageError(
            f"--keep: VTW withdraws every visual token; leave it out and choose the layer with --layers, got {asked:g}"
        )
    total = basis.model.layers
    chosen = (
        None
        if layers is None
        else parse_layers(layers, total)
        if isinstance(layers, str)
        else check_layers(layers, total)
    )
    if chosen is not None and method not in ("fastv", "vtw", "pyramiddrop"):
        raise UsageError(f"--layers: {method} has no layers to choose, got {','.join(map(str, chosen))}")
    if chosen is not None and method != "pyramiddrop" and len(chosen) > 1:
        raise UsageError(f"--layers: {METHODS[method].title} drops before one layer, got {','.join(map(str, chosen))}")
    plan = _BUILDERS[method](basis, significant(asked), chosen, evidence or SearchStats())
    rule = "published" if layers is None else layers if isinstance(layers, str) else ",".join(map(str, layers))
    found = plan.pop("search", ())
    provenance = basis.provenance.model_copy(
        update={"model_fingerprint": basis.model.fingerprint, "layer_rule": rule, "search": tuple(found)}
    )
    return Recipe.parse(
        {
            "method": method,
            "regime": basis.regime,
            "model": basis.model,
            "final_keep": plan["keep"][-1],
            "reference": basis.reference,
            "seed": basis.seed,
            "reference_tokens": basis.model.visual_tokens,
            "position_policy": basis.position_policy,
            "provenance": provenance,
            **plan,
        }
    )


def at_compute(build: Callable[[float], Recipe], compute: float, tokens: int) -> Recipe:
    """The recipe with the most tokens at the end whose language model costs at most `compute` of the unpruned one, text
    included.

    build: keep -> recipe, its cost growing with keep; `tokens`: of one image. RecipeError when even one token costs
    more.
    """
    low, high, best = 1, tokens, None
    while low <= high:
        middle = (low + high) // 2
        try:
            recipe = build(keep_of(middle, tokens))
        except RecipeError:  # a search that cannot go so low
            if middle == tokens:
                raise
            low = middle + 1
            continue
        if _language_ratio(recipe) <= compute:
            best, low = recipe, middle + 1
        else:
            high = middle - 1
    if best is None:
        raise RecipeError(
            f"compute: no recipe of this method costs {compute:.1%} of the language model or less; ask for more"
        )
    return best


def _language_ratio(recipe: Recipe) -> float:
    spent = recipe_cost(recipe)
    if spent is None:
        raise RecipeError(
            "model: the sizes of the language model are unknown, so compute cannot be matched; make the profile again"
        )
    return spent.ratio_language


def _fastv(basis: RecipeContext, keep: float, layers: list[int] | None, evidence: SearchStats) -> dict[str, Any]:
    return {
        "candidates": layers or [_inside(FASTV_LAYER, basis)],
        "keep": [keep],
        "selections": [{"score": "last_token"}],
    }


def _pyramiddrop(basis: RecipeContext, keep: float, layers: list[int] | None, evidence: SearchStats) -> dict[str, Any]:
    depth = basis.model.layers
    places = layers or sorted({_inside(round(depth * i / 4), basis) for i in (1, 2, 3)})
    table = [keep ** (i / len(places)) for i in range(1, len(places))]
    return {
        "candidates": places,
        "keep": [*(significant(r) for r in table), keep],
        "selections": [{"score": "own_last_token"}],
    }


def _vtw(basis: RecipeContext, keep: float, layers: list[int] | None, evidence: SearchStats) -> dict[str, Any]:
    place, found = layers[0] if layers else _inside(round(VTW_LAYER * basis.model.layers), basis), []
    if layers is None and evidence.withdrawal:
        place, sentence = withdrawal_layer(evidence)
        found = [sentence]
    return {"candidates": [place], "keep": [0.0], "selections": [{"score": "none"}], "search": found}


def withdrawal_layer(evidence: SearchStats) -> tuple[int, str]:
    """VTW's search: the first layer whose mean KL is at most the threshold, the last one where none is; and the
    sentence that says so."""
    known = sorted(evidence.withdrawal.items())
    for layer, kl in known:
        if kl <= evidence.threshold:
            return (
                layer,
                (
                    f"withdrawing before layer {layer} changes the next-token distribution by a mean KL of {kl:.2g}"
                    f" over {evidence.samples} samples"
                ),
            )
    layer, kl = known[-1]
    return (
        layer,
        (
            f"no layer is within a mean KL of {evidence.threshold:g} over {evidence.samples} samples; the last one,"
            f" {layer}, has {kl:.2g}"
        ),
    )


def _divprune(basis: RecipeContext, keep: float, layers: list[int] | None, evidence: SearchStats) -> dict[str, Any]:
    return _first(keep, {"score": "none", "policy": "maxmin"})


def _cdpruner(basis: RecipeContext, keep: float, layers: list[int] | None, evidence: SearchStats) -> dict[str, Any]:
    return _first(keep, {"score": "relevance", "policy": "dpp"})


def _random(basis: RecipeContext, keep: float, layers: list[int] | None, evidence: SearchStats) -> dict[str, Any]:
    return _first(keep, {"score": "random"})


def _grid(basis: RecipeContext, keep: float, layers: list[int] | None, evidence: SearchStats) -> dict[str, Any]:
    return _first(keep, {"score": "none", "policy": "grid"})


def _first(keep: float, selection: dict[str, Any]) -> dict[str, Any]:
    return {"candidates": [BEFORE], "keep": [keep], "selections": [selection]}


def _fitprune(basis: RecipeContext, keep: float, layers: list[int] | None, evidence: SearchStats) -> dict[str, Any]:
    tokens, sizes = basis.model.visual_tokens, _sizes(basis.model)
    unpruned = basis.model.layers * layer_macs(tokens, sizes)

    def ratio(shares: Sequence[float]) -> float:
        return sum(layer_macs(round(share * tokens), sizes) for share in shares) / unpruned

    alpha, shares = search(evidence.attention, keep, ratio)
    alive, candidates, table = tokens, [], []
    for layer, share in enumerate(shares):
        count = max(1, round(share * tokens))
        if count < alive:
            alive = count
            candidates.append(layer)
            table.append(keep_of(count, tokens))
    if not candidates:
        candidates, table = [basis.model.layers - 1], [1.0]
    note = (
        f"alpha {alpha:.2f} over {len(evidence.attention)} samples reaches a compute ratio of {ratio(shares):.4f} for"
        " the visual tokens"
    )
    return {"candidates": candidates, "keep": table, "selections": [{"score": "cross_self"}], "search": [note]}


def _inside(layer: int, basis: RecipeContext) -> int:
    """A decoder layer that exists and is not the first."""
    if basis.model.layers < 2:
        raise UsageError(
            f"layers: pruning between layers needs a model of at least 2 decoder layers, got {basis.model.layers}"
        )
    return min(max(layer, 1), basis.model.layers - 1)


def _sizes(model: ModelFacts) -> DecoderSizes:
    if model.hidden_size is None or model.kv_size is None or model.intermediate_size is None:
        raise RecipeError("model: the sizes of the language model are unknown, so compute cannot be predicted")
    return DecoderSizes(model.layers, model.hidden_size, model.kv_size, model.intermediate_size)


_BUILDERS: dict[str, Callable[[RecipeContext, float, list[int] | None, SearchStats], dict[str, Any]]] = {
    "fastv": _fastv,
    "pyramiddrop": _pyramiddrop,
    "vtw": _vtw,
    "divprune": _divprune,
    "cdpruner": _cdpruner,
    "random": _random,
    "grid": _grid,
    "fitprune": _fitprune,
}
