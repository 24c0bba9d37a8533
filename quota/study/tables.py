"""The studies that are tables of accuracy: which configurations, and which pairs are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from quota.allocate.methods import BASELINES
from quota.core.errors import RecipeError
from quota.core.recipe import Recipe, ScoreWeights
from quota.study.bench import FLOAT, MODULES, QUANTIZED, Bench, Entry

KEEPS = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
SWEEP = ((0.45, 0.25, 0.10, 0.20), (0.35, 0.25, 0.10, 0.30), (0.55, 0.25, 0.10, 0.10), (0.25, 0.25, 0.25, 0.25))
SIGNALS = ("inter", "mag", "intra", "quant")


@dataclass(frozen=True)
class Plan:
    """A study's rows, the float model first, and pairs (row, against) to compare. chart: "bars", "keep" or "compute". notes: what is missing."""

    title: str
    entries: list[Entry]
    compare: list[tuple[str, str]] = field(default_factory=list)
    chart: str = "bars"
    notes: list[str] = field(default_factory=list)


def _float(bench: Bench) -> Entry:
    return Entry("float", bench.float_checkpoint, FLOAT)


def modules(bench: Bench) -> Plan:
    """Table 1: which parts are quantized."""
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
        rows.append(Entry(f"keep {100 * ratio:g} %", quantized, QUANTIZED, bench.planned("quota", ratio), {"keep": ratio}))
    return Plan("QUOTA at falling keep ratios", rows, [(e.name, "keep 100 %") for e in rows[2:]], "keep")


def pipelines(bench: Bench) -> Plan:
    """Table 3: joint against stage-wise."""
    quantized, ratio = bench.quantized(), bench.settings.keep
    uniform, joint = bench.planned("uniform", ratio), bench.planned("quota", ratio)
    rows = [
        _float(bench), Entry("quant-only", quantized, QUANTIZED), Entry("prune-only", bench.float_checkpoint, FLOAT, uniform),
        Entry("quantize-then-prune", quantized, QUANTIZED, uniform),
        Entry("prune-then-quantize", bench.quantized(recipe=uniform), f"{QUANTIZED}, calibrated on the pruned graph", uniform),
        Entry("collaborative", quantized, QUANTIZED, joint),
    ]  # fmt: skip
    return Plan(
        f"Pipelines at {ratio:.0%} of the visual tokens", rows,
        [("collaborative", other) for other in ("quantize-then-prune", "prune-then-quantize", "quant-only", "prune-only")],
    )  # fmt: skip


def compute(bench: Bench) -> Plan:
    """Table 4: every method at the compute QUOTA spends, under float and W4A4KV4; VTW at the layer its search finds."""
    quantized = bench.quantized()
    joint = bench.planned("quota", bench.settings.keep)
    budget = bench.cost(joint).ratio_language
    rows, pairs, notes = [_float(bench), Entry("quant-only", quantized, QUANTIZED)], [], []
    for weights, checkpoint in ((FLOAT, bench.float_checkpoint), (QUANTIZED, quantized)):
        plans = {"quota": joint, "uniform": bench.planned("uniform", compute=budget)}
        for policy in ("mmr", "grid"):
            selection = {"policy": policy, "grid_share": 0.25} if policy == "grid" else {"policy": policy}
            plans[f"quota, {policy}"] = Recipe.parse({**joint.model_dump(), "selections": [selection]})
        for method in BASELINES:
            try:
                plans[method] = bench.planned(method, compute=None if method == "vtw" else budget, checkpoint=checkpoint)
            except RecipeError as error:
                notes.append(f"No row for {method} ({weights}): {error}.")
        rows += [Entry(f"{name} ({weights})", checkpoint, weights, plan) for name, plan in plans.items()]
        pairs += [(f"{name} ({weights})", f"random ({weights})") for name in plans if name != "random"]
        pairs += [(f"quota ({weights})", f"{name} ({weights})") for name in plans if name not in ("quota", "random")]
    return Plan(f"Methods at {budget:.1%} of the language model's compute", rows, pairs, "compute", notes)


def weights(bench: Bench) -> Plan:
    """Table 5: leave one signal out, other mixtures, each signal alone, and the quantization term with the opposite sign."""
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
        mixtures[f"without {name}"] = ScoreWeights(**{name: 0.0, **{k: v / sum(rest.values()) for k, v in rest.items()}})
    for name in SIGNALS:
        mixtures[f"only {name}"] = ScoreWeights(**{k: float(k == name) for k in SIGNALS})
    mixtures["45/25/10/-20 (quant reversed)"] = ScoreWeights(quant=-0.2)
    mixtures["only quant, reversed"] = ScoreWeights(inter=0.0, mag=0.0, intra=0.0, quant=-1.0)
    rows = [_float(bench), Entry("quant-only", quantized, QUANTIZED)]
    for name, mixture in mixtures.items():
        plan = Recipe.parse({**joint.model_dump(), "weights": mixture.model_dump()})
        rows.append(Entry(name, quantized, QUANTIZED, plan, mixture.model_dump()))
    first = next(iter(mixtures))
    return Plan(f"Score weights (inter/mag/intra/quant) at {bench.settings.keep:.0%}", rows, [(first, name) for name in mixtures if name != first])


TABLES: dict[str, Callable[[Bench], Plan]] = {"modules": modules, "keep": keep, "pipelines": pipelines, "compute": compute, "weights": weights}
