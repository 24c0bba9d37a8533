"""A recipe from a profile and a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from quota.allocate.candidates import check_layers, choose_candidates, parse_layers
from quota.allocate.profile import Profile
from quota.allocate.solve import allocate, check_keep, uniform
from quota.core.errors import RecipeError
from quota.core.keep import significant
from quota.core.recipe import Provenance, Recipe
from quota.core.selection import ScoreWeights

_Plan = Callable[[list[float], float, float, ScoreWeights], tuple[list[float], ScoreWeights]]


def _quota(
    sensitivities: list[float], keep: float, tau: float, weights: ScoreWeights
) -> tuple[list[float], ScoreWeights]:
    return allocate(sensitivities, keep, tau), weights


def _uniform(
    sensitivities: list[float], keep: float, tau: float, weights: ScoreWeights
) -> tuple[list[float], ScoreWeights]:
    return uniform(len(sensitivities), keep), weights.without_quant()


_PLANS: Mapping[str, _Plan] = {"quota": _quota, "uniform": _uniform}  # methods of `search="profile"`


def build_recipe(
    profile: Profile,
    keep: float,
    layers: str | Sequence[int] | None = None,
    tau: float = 1.0,
    method: str = "quota",
    reference: str = "recorded",
    position_policy: str = "original",
    weights: ScoreWeights | None = None,
) -> Recipe:
    """The recipe that keeps `keep` of the visual tokens after the last candidate layer.

    layers: "2-6", "2,4,6", a list, or None for the rule of `quota.allocate.candidates`.
    method: "quota" shares the drops by sensitivity, equations (1)-(4); "uniform" drops the same at every candidate and
    scores without the quantization term, which is what stage-wise pruning does. Deterministic. RecipeError or
    UsageError name the option.
    """
    check_keep(keep)
    final_keep = significant(keep)
    total = profile.model.layers
    if layers is None:
        candidates, rule = choose_candidates(profile.concentration_median), "auto"
    elif isinstance(layers, str):
        candidates, rule = parse_layers(layers, total), layers.strip()
    else:
        candidates, rule = check_layers(layers, total), ",".join(str(i) for i in layers)
    sensitivities = [profile.sensitivity[i] for i in candidates]
    if method not in _PLANS:
        raise RecipeError(f"method: expected {' or '.join(_PLANS)}, got {method!r}")
    table, weights = _PLANS[method](sensitivities, final_keep, tau, weights or ScoreWeights())
    return Recipe.parse(
        {
            "method": method,
            "regime": profile.regime,
            "model": profile.model,
            "candidates": candidates,
            "keep": table,
            "final_keep": final_keep,
            "tau": float(tau),
            "reference": reference,
            "reference_tokens": profile.model.visual_tokens,
            "weights": weights,
            "position_policy": position_policy,
            "sensitivities": sensitivities,
            "provenance": Provenance(
                model_fingerprint=profile.model.fingerprint,
                calibration_fingerprint=profile.calibration_fingerprint,
                tool_version=profile.tool_version,
                samples=profile.samples,
                layer_rule=rule,
            ),
        }
    )
