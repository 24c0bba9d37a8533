"""From a row of logits to a token: the likeliest (the lower of equals), or one drawn. Drawing runs on one row in
float64, and randomness is a hash of (seed, place), so a request's tokens depend neither on the batch nor on other
requests: after a preemption the same token is drawn again.

Order of what a request may ask for: repetition penalty, frequency and presence penalty, bias, schema, temperature,
top_k, min_p, top_p."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from quota.core.errors import UsageError
from quota.runtime.engine.grammar import Grammars
from quota.runtime.engine.request import SamplingParams


class Logits:
    """Logits [M, N] of a step's rows and the likeliest token int64 [M] of each. On a GPU only the tokens are fetched,
    until a row's logits are asked for; they hold until the next step."""

    def __init__(self, values: Tensor, likeliest: Tensor) -> None:
        self._values, self.likeliest = values, likeliest.tolist()

    @cached_property
    def host(self) -> np.ndarray:
        """All rows on the host."""
        return self._values.cpu().numpy()

    def rows(self, count: int) -> list[Row]:
        """The first `count`."""
        return [Row(self, number) for number in range(count)]


@dataclass(frozen=True)
class Row:
    """One row of logits."""

    logits: Logits
    number: int

    @property
    def values(self) -> np.ndarray:
        """float32 [N]."""
        return self.logits.host[self.number]

    @property
    def likeliest(self) -> int:
        """The token of the largest logit, the lower of equals."""
        return self.logits.likeliest[self.number]


class Sampler:
    """Chooses the tokens of one request. prompt: its token ids. UsageError for a bias on a token outside the
    vocabulary, and as `Grammars.matcher`."""

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int], vocabulary: int, grammars: Grammars) -> None:
        self.sampling, self.seed = sampling, sampling.drawn_seed()
        foreign = [token for token, _ in sampling.logit_bias if not 0 <= token < vocabulary]
        if foreign:
            raise UsageError(f"logit_bias: expected tokens 0 to {vocabulary - 1}, got {foreign[0]}")
        self._bias = tuple(np.array(part) for part in zip(*sampling.logit_bias, strict=True))
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._counts: Counter[int] = Counter()
        self._matcher = None if sampling.json_schema is None else grammars.matcher(sampling.json_schema)
        self._plain = not (sampling.adjusts or self._matcher)

    def choose(self, logits: Row, step: int) -> int:
        """The next token; step: how many were chosen before."""
        greedy = self.sampling.temperature == 0
        if self._plain:
            return logits.likeliest if greedy else sample_token(logits.values, self.sampling, self.seed, step)
        values = self._adjusted(logits.values)
        token = int(values.argmax()) if greedy else sample_token(values, self.sampling, self.seed, step)
        self._counts[token] += 1
        if self._matcher is not None:
            self._matcher.accept(token)
        return token

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """float [N] -> float64 [N]."""
        s, x = self.sampling, logits.astype(np.float64)
        if s.repetition_penalty != 1:  # CTRL (Keskar et al. 2019): over the prompt and the answer
            seen = np.fromiter(self._seen | set(self._counts), dtype=np.int64)
            x[seen] = np.where(x[seen] > 0, x[seen] / s.repetition_penalty, x[seen] * s.repetition_penalty)
        if self._counts and (s.frequency_penalty or s.presence_penalty):  # over the answer alone, as OpenAI
            token = np.fromiter(self._counts.keys(), dtype=np.int64)
            x[token] -= s.frequency_penalty * np.fromiter(self._counts.values(), dtype=np.float64) + s.presence_penalty
        if self._bias:
            np.add.at(x, self._bias[0], self._bias[1])
        if self._matcher is not None:
            x[~self._matcher.allowed()] = -np.inf
        return x


def sample_token(logits: np.ndarray, sampling: SamplingParams, seed: int, step: int) -> int:
    """logits float [N], a temperature above 0. Ties go to the lower token."""
    x = logits.astype(np.float64)
    order = np.argsort(-x, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    # subtracting first keeps tiny temperatures from overflowing
    weight = np.exp((x[order] - x[order[0]]) / sampling.temperature)
    if sampling.min_p:
        weight = weight[weight >= sampling.min_p]  # the likeliest has weight 1
    total = np.cumsum(weight)
    if sampling.top_p < 1:
        kept = int(np.searchsorted(total, sampling.top_p * total[-1])) + 1
        order, total = order[:kept], total[:kept]
    at = int(np.searchsorted(total, uniform(seed, step) * total[-1], side="right"))
    return int(order[min(at, len(order) - 1)])


def uniform(seed: int, step: int) -> float:
    """In [0, 1), 53 bits."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53)


def logprobs(logits: np.ndarray, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of `token` and the `top` likeliest (token, log-probability), best first."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    best = np.argsort(-x, kind="stable")[:top]
    return float(x[token]), [(int(i), float(x[i])) for i in best]
