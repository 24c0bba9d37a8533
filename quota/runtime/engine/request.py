"""What a caller asks for and what it gets back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from quota.core.errors import UsageError
from quota.core.recipe import Recipe

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_STOPS, MAX_LOGPROBS, MAX_BIASES = 16, 20, 300
MAX_STOP_CHARACTERS = (
    1024  # of each stop text: what an answer may hold back, and what the engine's thread prepares per request
)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. temperature 0 is greedy; top_k 0 is no limit.

    min_p: tokens less likely than this share of the likeliest are not drawn. presence_penalty, frequency_penalty: taken
    from the logits of tokens that the answer holds, once and as often as it does; repetition_penalty divides positive
    logits of tokens of prompt and answer and multiplies negative ones. logit_bias: (token, added to its logit).
    json_schema: the answer is JSON of this schema (JSON text). seed: None draws one. stop: texts that end the answer
    and are not part of it. logprobs: how many alternatives to report per token, None for no report at all. ignore_eos:
    go on after the end token (for measurements). UsageError names a field that is out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str | None = None

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _check(0 <= self.temperature <= 100, "temperature", "0 to 100", self.temperature)
        _check(0 < self.top_p <= 1, "top_p", "above 0, at most 1", self.top_p)
        _check(self.top_k >= 0, "top_k", "0 (no limit) or more", self.top_k)
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer", self.seed)
        _check(0 <= self.min_p <= 1, "min_p", "0 to 1", self.min_p)
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", "-2 to 2", self.presence_penalty)
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "-2 to 2", self.frequency_penalty)
        _check(0 < self.repetition_penalty <= 2, "repetition_penalty", "above 0, at most 2", self.repetition_penalty)
        _check(len(self.logit_bias) <= MAX_BIASES, "logit_bias", f"at most {MAX_BIASES} tokens", len(self.logit_bias))
        _check(all(-100 <= bias <= 100 for _, bias in self.logit_bias), "logit_bias", "-100 to 100", self.logit_bias)
        _check(
            self.json_schema is None or not self.ignore_eos,
            "json_schema",
            "no ignore_eos beside it: a complete value ends the answer",
            self.ignore_eos,
        )
        lengths = [len(text) for text in self.stop]
        good = len(lengths) <= MAX_STOPS and all(1 <= length <= MAX_STOP_CHARACTERS for length in lengths)
        _check(
            good,
            "stop",
            f"at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters",
            f"{len(lengths)} of up to {max(lengths, default=0)}",
        )
        _check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            f"0 to {MAX_LOGPROBS}",
            self.logprobs,
        )

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return penalties != (0, 0, 1) or bool(self.logit_bias)

    def drawn_seed(self) -> int:
        """The seed, or a fresh one."""
        return int.from_bytes(os.urandom(8)) >> 1 if self.seed is None else self.seed


def _check(good: bool, name: str, expected: str, found: object) -> None:
    if not good:
        raise UsageError(f"{name}: expected {expected}, got {found!r}")


@dataclass(frozen=True)
class Prompt:
    """Token ids with one image token per visual token, and the images in order, as the model family's processor made
    them.

    selection_tokens: the visual tokens are chosen by what this many leading tokens say; None is the whole prompt. A
    chat passes the length of its prompt up to the first answer after the last image, so that later turns keep the
    first selection.
    """

    ids: Sequence[int]
    images: Sequence[Any] = ()
    selection_tokens: int | None = None


@dataclass(frozen=True)
class Request:
    """One answer to make. recipe: a name the engine knows, a Recipe of its own with known prune points, or None for no
    pruning; the string "default" is the engine's default. keep: another final keep ratio for that recipe. keep_tokens:
    at most so many visual tokens of the largest image stay after the last drop, whatever the ratio. return_kept: report
    which visual tokens stay, which costs the sharing of pages. client: on whose behalf; clients take fair turns, and
    the requests of one go in order of arrival."""

    id: str
    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    recipe: Recipe | str | None = "default"
    keep: float | None = None
    keep_tokens: int | None = None
    return_kept: bool = False
    client: str = ""


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its natural log-probability under the model's own distribution (temperature 1).

    text: what it adds to the answer, so that the texts of all tokens join to the answer's; a character that several
    tokens make is the last one's. An alternative that would add none has its name in the vocabulary. utf8: its bytes,
    its share of such a character too; None for special tokens. top: the likeliest alternatives in its place, best
    first.
    """

    token: int
    text: str
    utf8: bytes | None
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Counts of one request. visual_by_layer: visual tokens alive in each decoder layer; cached: prompt tokens whose
    keys and values were reused instead of computed. kept: decoder layer -> visual tokens alive from there on, counted
    over all images in raster order, where the request asks for them."""

    prompt_tokens: int
    completion_tokens: int
    visual_tokens: int
    visual_by_layer: tuple[int, ...]
    cached_tokens: int
    selection_tokens: int
    preemptions: int
    kept: Mapping[int, tuple[int, ...]] | None = None

    @property
    def visual_kept(self) -> int:
        """Visual tokens alive in the last layer."""
        return self.visual_by_layer[-1] if self.visual_by_layer else 0


@dataclass(frozen=True)
class Output:
    """What one step added to one request. The last one carries a reason and the usage; `error` says why it failed."""

    id: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None
