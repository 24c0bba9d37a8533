"""The methods a recipe can be made by, one row each: where it drops, how it chooses, and its published defaults.

Plain data: `quota.allocate.baselines` makes a recipe from a row, and the recipe schema and `--help` are written from
its words. A method that searches (`needs`) also has a search there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from quota.core.selectors import POLICIES, SCORES

# profile: float and quantized model, layer by layer; withdrawal, attention: a search on one model; nothing
Search = Literal["profile", "withdrawal", "attention", ""]


@dataclass(frozen=True)
class Method:
    """keep: published (or this project's) default of `--keep`, and what the number means. at: where it drops unless a
    search finds it, a decoder layer (0: before the language model) or a share of the depth; each drop keeps the same
    share of what is alive. layers: most layers that `--layers` may name, None for any number. selection: how every
    candidate chooses. drops: how the drops differ from layer to layer. parameter: the field of a recipe that they
    follow. search: what is measured before."""

    title: str
    where: str
    source: str
    keep: float
    keep_means: str
    at: tuple[int | Fraction, ...] = ()
    layers: int | None = 0
    selection: Mapping[str, str] = field(default_factory=dict)
    drops: str = ""
    parameter: str | None = None
    remark: str = ""
    search: Search = ""

    @property
    def withdraws(self) -> bool:
        """Whether no visual token stays."""
        return self.keep == 0

    @property
    def help(self) -> str:
        keep = f" --keep: {self.keep_means}, default {self.keep:g}."
        return f"{self.title}: {self.words}{self._choice}{self.remark}.{keep} {self.source}"

    @property
    def words(self) -> str:
        return f"{self.where}, {self.drops}" if self.drops else self.where

    @property
    def _choice(self) -> str:
        if self.withdraws:
            return ""
        policy = POLICIES[self.selection.get("policy", "topk")]
        score = SCORES[self.selection.get("score", "quota")]
        return f"; {policy.words}" + (f"; score: {score.words}" if policy.uses_score else "")


_FINAL = "share alive after the last drop"
_ONCE = "share kept by its only drop"
_BEFORE = "once, before the language model"

METHODS: dict[str, Method] = {
    "quota": Method(
        "QUOTA",
        "at a range of layers",
        "This project's method.",
        0.3,
        _FINAL,
        layers=None,
        drops="in proportion to how little quantization disturbs each layer",
        parameter="tau",
        search="profile",
    ),
    "uniform": Method(
        "Uniform",
        "at the same layers",
        "Stage-wise pruning, the control of QUOTA.",
        0.3,
        _FINAL,
        layers=None,
        drops="by the same share at every candidate layer",
        remark=" without the quantization term",
        search="profile",
    ),
    "fastv": Method(
        "FastV",
        "once, before layer 2",
        "arXiv 2403.06764: K = 2, R = 50 %.",
        0.5,
        _ONCE,
        (2,),
        1,
        {"score": "last_token"},
    ),
    "pyramiddrop": Method(
        "PyramidDrop",
        "before the layers at 1/4, 1/2 and 3/4 of the depth",
        "arXiv 2410.17247: lambda = 0.5; its code renumbers positions.",
        0.125,
        f"{_FINAL}; each stage keeps its cube root",
        (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)),
        None,
        {"score": "own_last_token"},
    ),
    "vtw": Method(
        "VTW",
        "all visual tokens leave before one layer, the first where the next-token distribution hardly changes (mean"
        " KL at most 0.003 over 20 samples)",
        "arXiv 2405.05803: layer 15 of 32.",
        0.0,
        "always 0",
        (Fraction(15, 32),),
        1,
        {"score": "none"},
        search="withdrawal",
    ),
    "divprune": Method(
        "DivPrune",
        _BEFORE,
        "arXiv 2503.02175; its code renumbers positions.",
        0.098,
        _ONCE,
        (0,),
        selection={"score": "none", "policy": "maxmin"},
    ),
    "cdpruner": Method(
        "CDPruner",
        _BEFORE,
        "arXiv 2506.10967: 64 of 576; its code renumbers positions.",
        0.111111,
        _ONCE,
        (0,),
        selection={"score": "relevance", "policy": "dpp"},
        remark=" (published with CLIP's text tower, which a LLaVA checkpoint does not hold)",
    ),
    "random": Method(
        "Random",
        _BEFORE,
        "The floor every method must beat.",
        0.3,
        _ONCE,
        (0,),
        selection={"score": "random"},
    ),
    "grid": Method(
        "Uniform grid",
        _BEFORE,
        "The other floor; knows neither question nor content.",
        0.3,
        _ONCE,
        (0,),
        selection={"score": "none", "policy": "grid"},
    ),
    "fitprune": Method(
        "FitPrune",
        "wherever its search on calibration attention finds room",
        "arXiv 2409.10197: 60 % fewer FLOPs.",
        0.4,
        "compute of the visual tokens against unpruned",
        selection={"score": "cross_self"},
        search="attention",
    ),
}
BY_HAND = "custom"


def baselines() -> tuple[str, ...]:
    """Methods that need one model alone, not a profile of two."""
    return tuple(name for name, method in METHODS.items() if method.search != "profile")


def withdrawing() -> str:
    """The methods that keep no visual token, for a message."""
    return " or ".join(name for name, method in METHODS.items() if method.withdraws)


def method_words() -> dict[str, str]:
    """What a recipe may say its method is, and what that means."""
    return {name: f"{method.title}, {method.words}" for name, method in METHODS.items()} | {BY_HAND: "written by hand"}


def methods_help() -> str:
    """One paragraph per method for `--help`."""
    return "\n\n".join(f"- `{name}` {method.help}" for name, method in METHODS.items())
