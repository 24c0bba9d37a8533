"""Published figures (percent of the float model) of the same configurations, to stand beside a study's own rows. They
are never averaged with them."""

from __future__ import annotations

from quota.models import family_class
from quota.study.results import PublishedRow

_MEAN = "mean of MMB, MME, GQA, POPE, SEED, SQA-I"
_SUBSET = "mean of MMB, MME, SQA"


def published(study: str, family: str) -> list[PublishedRow]:
    """The rows known for a study on a model of the family; none where nothing was published."""
    model = family_class(family).published
    values, measures = _FIGURES.get((study, model), ({}, ""))
    return [PublishedRow(name=name, retention=value, measures=f"{model}, {measures}") for name, value in values.items()]


_FIGURES: dict[tuple[str, str], tuple[dict[str, float], str]] = {
    ("modules", "LLaVA-1.5-7B"): ({"llm": 96.26, "vision+llm": 95.75, "vision+projector+llm": 96.45}, _MEAN),
    ("keep", "LLaVA-1.5-7B"): (
        {
            "keep 50 %": 95.93,
            "keep 40 %": 95.81,
            "keep 30 %": 95.65,
            "keep 20 %": 93.27,
            "keep 10 %": 91.55,
            "keep 5 %": 86.86,
        },
        _MEAN,
    ),
    ("pipelines", "LLaVA-1.5-7B"): (
        {
            "quant-only": 96.45,
            "prune-only": 97.81,
            "quantize-then-prune": 94.30,
            "prune-then-quantize": 94.34,
            "collaborative": 95.65,
        },
        _MEAN,
    ),
    ("pipelines", "Qwen2.5-VL-7B"): (
        {"prune-only": 93.85, "quant-only": 96.35, "collaborative": 93.38},
        "mean over benchmarks",
    ),
    ("weights", "LLaVA-1.5-7B"): (
        {
            "45/25/10/20 (default)": 94.07,
            "without inter": 92.57,
            "without mag": 93.20,
            "without intra": 92.45,
            "without quant": 93.10,
            "35/25/10/30": 93.99,
        },
        _SUBSET,
    ),
}
