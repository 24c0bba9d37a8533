"""Figures published for LLaVA-1.5-7B (percent of the float model), to stand beside a study's own rows. They are never averaged with them."""

from __future__ import annotations

from quota.study.results import PublishedRow

_MEAN = "mean of MMB, MME, GQA, POPE, SEED, SQA-I"
_SUBSET = "mean of MMB, MME, SQA"


def _rows(values: dict[str, float], measures: str = _MEAN) -> list[PublishedRow]:
    return [PublishedRow(name=name, retention=value, measures=f"LLaVA-1.5-7B, {measures}") for name, value in values.items()]


PUBLISHED: dict[str, list[PublishedRow]] = {
    "modules": _rows({"llm": 96.26, "vision+llm": 95.75, "vision+projector+llm": 96.45}),
    "keep": _rows({"keep 50 %": 95.93, "keep 40 %": 95.81, "keep 30 %": 95.65, "keep 20 %": 93.27, "keep 10 %": 91.55, "keep 5 %": 86.86}),
    "pipelines": _rows({
        "quant-only": 96.45, "prune-only": 97.81, "quantize-then-prune": 94.30, "prune-then-quantize": 94.34, "collaborative": 95.65,
    }),
    "weights": _rows({
        "45/25/10/20 (default)": 94.07, "without inter": 92.57, "without mag": 93.20, "without intra": 92.45, "without quant": 93.10, "35/25/10/30": 93.99,
    }, _SUBSET),
}  # fmt: skip
