"""From a row of logits to a token: the likeliest (the lower of equals), or one drawn. Drawing runs on one row in
float64, and randomness is a hash of (seed, place), so a request's tokens depend neither on the batch nor on what
happened before: after a preemption the same token is drawn again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

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

    def choose(self, sampling: SamplingParams, seed: int, step: int) -> int:
        """The next token; place: how many were chosen before."""
        return (
            self.logits.likeliest[self.number]
            if sampling.temperature == 0
            else sample_token(self.values, sampling, seed, step)
        )


def sample_token(logits: np.ndarray, sampling: SamplingParams, seed: int, step: int) -> int:
    """logits float [N], a temperature above 0. Ties go to the lower token."""
    x = logits.astype(np.float64)
    order = np.argsort(-x, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    # subtracting first keeps tiny temperatures from overflowing
    weight = np.exp((x[order] - x[order[0]]) / sampling.temperature)
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
