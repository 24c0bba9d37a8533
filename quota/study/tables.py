"""The studies that are tables of accuracy: which configurations, and which pairs are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from quota.core.errors import RecipeError
from quota.core.methods import METHODS
from quota.core.recipe import Recipe, ScoreWeights
from quota.eval.pipeline import FLOAT, MODULES, QUANTIZED, WEIGHT_ONLY, Entry
from quota.study.bench import Bench

KEEPS = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
SWEEP = ((0.45, 0.25, 0.10, 0.20), (0.35, 0.25, 0.10, 0.30), (0.55, 0.25, 0.10, 0.10), (0.25, 0.25, 0.25, 0.25))
SIGNALS = ("inter", "mag", "intra", "quant")
ORDERS = ("prune-only", "quantize-then-prune", "prune-then-quantize")
ON_PRUNED = f"{QUANTIZED}, calibrated on the pruned graph"


@dataclass(frozen=True)
class Plan:
    """A study's rows, the float model first, and pairs (row, against) to compare. chart: "bars", "keep", "compute" or
    "orders". notes: what is missing."""

    title: str
    entries: list[Entry]
    compare: list[tuple[str, str]] = field(default_factory=list)
    chart: str = "bars"
    notes: list[str] = field(default_factory=list)


def _float(bench: Bench) -> Entry:
    return Entry("float", bench.float_checkpoint, FLOAT)


def modules(bench: Bench) -> Plan:
    """Table 1: which parts are quantized (the projector is Qwen2.5-VL's merger)."""
    rows = [_float(bench)]
    for chosen in (("llm",), ("vision", "llm"), MODULES):
        name = "+".join(chosen)
        rows.append(Entry(name, bench.quantized(chosen), f"{QUANTIZED}: {name}"))
    names = [e.name for e in rows[1:]]
    return Plan("Quantized modules, nothing pruned", rows, list(zip(names[1:], names[:-1], strict=True)))


def keep(bench: Bench) -> Plan:
    """Table 2: final keep ratios."""
    quantized = bench.quantized()
    rows = [_float(bench), Entry("keep 100 %", quantized, QUANTIZED, figures={"keep": 1.0})]
    for ratio in KEEPS:
        rows.append(
            Entry(f"keep {100 * ratio:g} %", quantized, QUANTIZED, bench.planned("quota", ratio), {"keep": ratio})
        )
    return Plan("QUOTA at falling keep ratios", rows, [(e.name, "keep 100 %") for e in rows[2:]], "keep")


def pipelines(bench: Bench) -> Plan:
    """Table 3: joint against stage-wise, and every published method at the joint recipe's compute: on the float model,
    applied to the quantized one, and with the quantized one calibrated on the graph it prunes."""
    quantized, ratio = bench.quantized(), bench.settings.keep
    uniform, joint = bench.planned("uniform", ratio), bench.planned("quota", ratio)
    rows = [
        _float(bench),
        Entry("quant-only", quantized, QUANTIZED),
        Entry(ORDERS[0], bench.float_checkpoint, FLOAT, uniform),
        Entry(ORDERS[1], quantized, QUANTIZED, uniform),
        Entry(ORDERS[2], bench.quantized(recipe=uniform), ON_PRUNED, uniform),
        Entry("collaborative", quantized, QUANTIZED, joint),
    ]
    pairs = [("collaborative", other) for other in (*ORDERS[1:], "quant-only", ORDERS[0])]
    budget, notes = bench.cost(joint).ratio_language, list[str]()
    alone, deployed = (_methods(bench, checkpoint, budget, notes) for checkpoint in (bench.float_checkpoint, quantized))
    rows += [Entry(f"{method}, {ORDERS[0]}", bench.float_checkpoint, FLOAT, plan) for method, plan in alone.items()]
    rows += [Entry(f"{method}, {ORDERS[1]}", quantized, QUANTIZED, plan) for method, plan in deployed.items()]
    rows += [
        Entry(f"{method}, {ORDERS[2]}", bench.quantized(recipe=plan), ON_PRUNED, plan) for method, plan in alone.items()
    ]
    for order, plans in zip(ORDERS, (alone, deployed, alone), strict=True):
        pairs += [
            (f"{method}, {order}", f"random, {order}") for method in plans if method != "random" and "random" in plans
        ]
        pairs += [("collaborative", f"{method}, {order}") for method in plans if order != ORDERS[0]]
    return Plan(
        f"Pipelines at {100 * ratio:g} % of the visual tokens", rows, pairs, "orders" if alone else "bars", notes
    )


def compute(bench: Bench) -> Plan:
    """Table 4: every method at the compute QUOTA spends, under float and W4A4KV4; VTW at the layer its search finds."""
    quantized = bench.quantized()
    joint = bench.planned("quota", bench.settings.keep)
    budget = bench.cost(joint).ratio_language
    rows, pairs, notes = (
        [_float(bench), Entry("quant-only", quantized, QUANTIZED)],
        list[tuple[str, str]](),
        list[str](),
    )
    for weights, checkpoint in ((FLOAT, bench.float_checkpoint), (QUANTIZED, quantized)):
        plans = {"quota": joint, "uniform": bench.planned("uniform", compute=budget)}
        for policy in ("mmr", "grid"):
            selection = {"policy": policy, "grid_share": 0.25} if policy == "grid" else {"policy": policy}
            plans[f"quota, {policy}"] = Recipe.parse({**joint.model_dump(), "selections": [selection]})
        plans |= _methods(bench, checkpoint, budget, notes)
        rows += [Entry(f"{name} ({weights})", checkpoint, weights, plan) for name, plan in plans.items()]
        pairs += [
            (f"{name} ({weights})", f"random ({weights})") for name in plans if name != "random" and "random" in plans
        ]
        pairs += [(f"quota ({weights})", f"{name} ({weights})") for name in plans if name not in ("quota", "random")]
    return Plan(f"Methods at {100 * budget:.1f} % of the language model's compute", rows, pairs, "compute", notes)


def _methods(bench: Bench, checkpoint: str, budget: float, notes: list[str]) -> dict[str, Recipe]:
    """The published methods at `budget` of the language model's compute, searched on `checkpoint`; VTW at the layer it
    finds. What has none is noted."""
    plans = {}
    for method in bench.settings.methods:
        try:
            plans[method] = bench.planned(
                method, compute=None if METHODS[method].withdraws else budget, checkpoint=checkpoint
            )
        except RecipeError as error:
            notes.append(
                f"No row for {method} ({FLOAT if checkpoint == bench.float_checkpoint else QUANTIZED}): {error}."
            )
    return plans


def weights(bench: Bench) -> Plan:
    """Table 5: leave one signal out, other mixtures, each signal alone, and the quantization term with the opposite
    sign."""
    quantized = bench.quantized()
    joint = bench.planned("quota", bench.settings.keep)
    default = ScoreWeights()
    mixtures: dict[str, ScoreWeights] = {}
    for shares in SWEEP:
        values = dict(zip(SIGNALS, shares, strict=True))
        label = "/".join(f"{100 * v:g}" for v in shares)
        mixtures[f"{label} (default)" if values == default.model_dump() else label] = ScoreWeights(**values)
    for name in SIGNALS:
        rest = {k: v for k, v in default.model_dump().items() if k != name}
        mixtures[f"without {name}"] = ScoreWeights(
            **{name: 0.0, **{k: v / sum(rest.values()) for k, v in rest.items()}}
        )
    for name in SIGNALS:
        mixtures[f"only {name}"] = ScoreWeights(**{k: float(k == name) for k in SIGNALS})
    mixtures["45/25/10/-20 (quant reversed)"] = ScoreWeights(quant=-0.2)
    mixtures["only quant, reversed"] = ScoreWeights(inter=0.0, mag=0.0, intra=0.0, quant=-1.0)
    rows = [_float(bench), Entry("quant-only", quantized, QUANTIZED)]
    for name, mixture in mixtures.items():
        plan = Recipe.parse({**joint.model_dump(), "weights": mixture.model_dump()})
        rows.append(Entry(name, quantized, QUANTIZED, plan, mixture.model_dump()))
    first = next(iter(mixtures))
    return Plan(
        f"Score weights (inter/mag/intra/quant) at {100 * bench.settings.keep:g} %",
        rows,
        [(first, name) for name in mixtures if name != first],
    )


def formats(bench: Bench) -> Plan:
    """Weights alone in 4 bits (RTN, GPTQ, AWQ; groups of 128) beside W4A4KV4, unpruned and with QUOTA's recipe."""
    joint, rows, pairs = bench.planned("quota", bench.settings.keep), [_float(bench)], list[tuple[str, str]]()
    made = {f"{WEIGHT_ONLY} {method}": (bench.weight_only(method), WEIGHT_ONLY) for method in ("rtn", "gptq", "awq")}
    made[QUANTIZED] = (bench.quantized(), QUANTIZED)
    for name, (checkpoint, weights) in made.items():
        rows += [Entry(name, checkpoint, weights), Entry(f"{name} + quota", checkpoint, weights, joint)]
        pairs += [(name, f"{WEIGHT_ONLY} rtn")] if weights == WEIGHT_ONLY and name != f"{WEIGHT_ONLY} rtn" else []
        pairs += [(f"{name} + quota", name)]
    pairs += [
        (QUANTIZED + end, f"{WEIGHT_ONLY} {method}{end}") for method in ("gptq", "awq") for end in ("", " + quota")
    ]
    return Plan(
        f"Weight-only baselines, unpruned and at {100 * bench.settings.keep:g} % of the visual tokens", rows, pairs
    )


TABLES: dict[str, Callable[[Bench], Plan]] = {
    "modules": modules,
    "keep": keep,
    "pipelines": pipelines,
    "compute": compute,
    "weights": weights,
    "formats": formats,
}
