"""The pruning methods a recipe can be made by: where each drops, how it chooses, and its published defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """keep: published (or this project's) default of `--keep`, and what the number means. needs: what is measured
    before: "profile" (float and quantized model), "withdrawal" or "attention" (one model), or "" (nothing)."""

    name: str
    title: str
    keep: float
    keep_means: str
    where: str
    choice: str
    source: str
    needs: str = ""

    @property
    def help(self) -> str:
        return (
            f"{self.title}: {self.where}; {self.choice}. --keep: {self.keep_means}, default {self.keep:g}."
            f" {self.source}"
        )


_FINAL = "share alive after the last drop"
_ONCE = "share kept by its only drop"

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(
            "quota",
            "QUOTA",
            0.3,
            _FINAL,
            "a range of layers, drops by sensitivity",
            "equation (8)",
            "This project's method.",
            "profile",
        ),
        Method(
            "uniform",
            "Uniform",
            0.3,
            _FINAL,
            "the same layers, equal drops",
            "equation (8) without the quantization term",
            "Stage-wise pruning, the control of QUOTA.",
            "profile",
        ),
        Method(
            "fastv",
            "FastV",
            0.5,
            _ONCE,
            "once, before layer 2",
            "attention of the last token in the layer before",
            "arXiv 2403.06764: K = 2, R = 50 %.",
        ),
        Method(
            "pyramiddrop",
            "PyramidDrop",
            0.125,
            f"{_FINAL}; each stage keeps its cube root",
            "before the layers at 1/4, 1/2 and 3/4 of the depth",
            "attention of the last token under the layer's own projections",
            "arXiv 2410.17247: lambda = 0.5; its code renumbers positions.",
        ),
        Method(
            "vtw",
            "VTW",
            0.0,
            "always 0",
            "all visual tokens leave before one layer",
            "the first layer where the next-token distribution hardly changes (mean KL at most 0.003 over 20 samples)",
            "arXiv 2405.05803: layer 15 of 32.",
            "withdrawal",
        ),
        Method(
            "divprune",
            "DivPrune",
            0.098,
            _ONCE,
            "once, before the language model",
            "greedy max-min diversity of the projected features",
            "arXiv 2503.02175; its code renumbers positions.",
        ),
        Method(
            "cdpruner",
            "CDPruner",
            0.111111,
            _ONCE,
            "once, before the language model",
            "greedy determinantal point process conditioned on relevance "
            "to the question (cosine to its word embeddings: a LLaVA checkpoint has no CLIP text tower)",
            "arXiv 2506.10967: 64 of 576; its code renumbers positions.",
        ),
        Method(
            "random",
            "Random",
            0.3,
            _ONCE,
            "once, before the language model",
            "a hash of seed, image and place",
            "The floor every method must beat.",
        ),
        Method(
            "grid",
            "Uniform grid",
            0.3,
            _ONCE,
            "once, before the language model",
            "places spread evenly over the image",
            "The other floor; knows neither question nor content.",
        ),
        Method(
            "fitprune",
            "FitPrune",
            0.4,
            "compute of the visual tokens against unpruned",
            "wherever its search on calibration attention finds room",
            "attention from text times attention from visual tokens, largest head each",
            "arXiv 2409.10197: 60 % fewer FLOPs.",
            "attention",
        ),
    )
}
BASELINES = tuple(name for name, m in METHODS.items() if m.needs != "profile")


def methods_help() -> str:
    """One paragraph per method for `--help`."""
    return "\n\n".join(f"- `{name}` {m.help}" for name, m in METHODS.items())
