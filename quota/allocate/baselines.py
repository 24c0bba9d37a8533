"""Published pruning methods as recipes of the same engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from quota.allocate.candidates import check_layers, parse_layers
from quota.allocate.compute import DecoderSizes, layer_macs
from quota.allocate.explain import recipe_cost
from quota.allocate.fitprune import AttentionSample, search
from quota.allocate.solve import check_keep
from quota.core.errors import RecipeError, UsageError
from quota.core.keep import keep_of, significant
from quota.core.methods import METHODS, Method, baselines
from quota.core.recipe import ModelFacts, Provenance, Recipe

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
    context: RecipeContext,
    method: str,
    keep: float | None = None,
    layers: str | Sequence[int] | None = None,
    stats: SearchStats | None = None,
) -> Recipe:
    """The recipe of a published method; what `keep` means and its default are in `quota.core.methods`.

    layers: instead of the method's own, as many as its row allows.
    RecipeError or UsageError name the option.
    """
    if method not in baselines():
        raise RecipeError(f"method: expected one of {', '.join(baselines())}, got {method!r}")
    row = METHODS[method]
    asked = row.keep if keep is None else keep
    if not row.withdraws:
        check_keep(asked)
    elif asked:
        raise UsageError(
            f"--keep: {row.title} withdraws every visual token; leave it out and choose the layer with --layers, got"
            f" {asked:g}"
        )
    chosen = _given_layers(row, layers, context.model.layers, method)
    asked, stats = significant(asked), stats or SearchStats()
    if chosen is None and row.search == "attention":
        plan = _by_attention(context, asked, stats)
    elif chosen is None and row.search == "withdrawal" and stats.withdrawal:
        plan = _by_withdrawal(stats)
    else:
        plan = _by_stages(chosen or _published_layers(row, context), asked)
    rule = "published" if layers is None else layers if isinstance(layers, str) else ",".join(map(str, layers))
    provenance = context.provenance.model_copy(
        update={"model_fingerprint": context.model.fingerprint, "layer_rule": rule, "search": plan.found}
    )
    return Recipe.parse(
        {
            "method": method,
            "regime": context.regime,
            "model": context.model,
            "candidates": plan.candidates,
            "keep": plan.keep,
            "final_keep": plan.keep[-1],
            "reference": context.reference,
            "seed": context.seed,
            "reference_tokens": context.model.visual_tokens,
            "position_policy": context.position_policy,
            "selections": [row.selection],
            "provenance": provenance,
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


@dataclass(frozen=True)
class _Plan:
    """Where a method drops and what it keeps from there on; found: facts of its search."""

    candidates: list[int]
    keep: list[float]
    found: tuple[str, ...] = ()


def _given_layers(row: Method, layers: str | Sequence[int] | None, total: int, name: str) -> list[int] | None:
    if layers is None:
        return None
    chosen = parse_layers(layers, total) if isinstance(layers, str) else check_layers(layers, total)
    if row.layers == 0:
        raise UsageError(f"--layers: {name} has no layers to choose, got {','.join(map(str, chosen))}")
    if row.layers is not None and len(chosen) > row.layers:
        raise UsageError(f"--layers: {row.title} drops before one layer, got {','.join(map(str, chosen))}")
    return chosen


def _published_layers(row: Method, context: RecipeContext) -> list[int]:
    depth = context.model.layers
    return sorted(
        {0 if at == 0 else _inside(round(at * depth) if isinstance(at, Fraction) else at, context) for at in row.at}
    )


def _by_stages(layers: list[int], keep: float) -> _Plan:
    """Every drop keeps the same share of what is alive."""
    table = [significant(keep ** (i / len(layers))) for i in range(1, len(layers))]
    return _Plan(layers, [*table, keep])


def _by_withdrawal(stats: SearchStats) -> _Plan:
    layer, sentence = withdrawal_layer(stats)
    return _Plan([layer], [0.0], (sentence,))


def withdrawal_layer(stats: SearchStats) -> tuple[int, str]:
    """VTW's search: the first layer whose mean KL is at most the threshold, the last one where none is; and the
    sentence that says so."""
    known = sorted(stats.withdrawal.items())
    for layer, kl in known:
        if kl <= stats.threshold:
            return (
                layer,
                (
                    f"withdrawing before layer {layer} changes the next-token distribution by a mean KL of {kl:.2g}"
                    f" over {stats.samples} samples"
                ),
            )
    layer, kl = known[-1]
    return (
        layer,
        (
            f"no layer is within a mean KL of {stats.threshold:g} over {stats.samples} samples; the last one,"
            f" {layer}, has {kl:.2g}"
        ),
    )


def _by_attention(context: RecipeContext, keep: float, stats: SearchStats) -> _Plan:
    tokens, sizes = context.model.visual_tokens, _sizes(context.model)
    unpruned = context.model.layers * layer_macs(tokens, sizes)

    def ratio(shares: Sequence[float]) -> float:
        return sum(layer_macs(round(share * tokens), sizes) for share in shares) / unpruned

    alpha, shares = search(stats.attention, keep, ratio)
    alive, candidates, table = tokens, [], []
    for layer, share in enumerate(shares):
        count = max(1, round(share * tokens))
        if count < alive:
            alive = count
            candidates.append(layer)
            table.append(keep_of(count, tokens))
    if not candidates:
        candidates, table = [context.model.layers - 1], [1.0]
    note = (
        f"alpha {alpha:.2f} over {len(stats.attention)} samples reaches a compute ratio of {ratio(shares):.4f} for"
        " the visual tokens"
    )
    return _Plan(candidates, table, (note,))


def _inside(layer: int, context: RecipeContext) -> int:
    """A decoder layer that exists and is not the first."""
    if context.model.layers < 2:
        raise UsageError(
            f"layers: pruning between layers needs a model of at least 2 decoder layers, got {context.model.layers}"
        )
    return min(max(layer, 1), context.model.layers - 1)


def _sizes(model: ModelFacts) -> DecoderSizes:
    if model.hidden_size is None or model.kv_size is None or model.intermediate_size is None:
        raise RecipeError("model: the sizes of the language model are unknown, so compute cannot be predicted")
    return DecoderSizes(model.layers, model.hidden_size, model.kv_size, model.intermediate_size)
