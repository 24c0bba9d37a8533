"""From a row of logits to a token. Everything runs on one row in float64, and randomness is a hash of (seed, place), so a request's tokens
depend neither on the batch nor on what happened before: after a preemption the same token is drawn again."""

from __future__ import annotations

import hashlib

import numpy as np

from quota.runtime.engine.request import Sampling

Row = np.ndarray


def choose_token(logits: Row, sampling: Sampling, seed: int, place: int) -> int:
    """logits float [N]; place: how many tokens were chosen before. Ties go to the lower token."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
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
    at = int(np.searchsorted(total, uniform(seed, place) * total[-1], side="right"))
    return int(order[min(at, len(order) - 1)])


def uniform(seed: int, place: int) -> float:
    """In [0, 1), 53 bits."""
    digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53)


def logprobs(logits: Row, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of `token` and the `top` likeliest (token, log-probability), best first."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    best = np.argsort(-x, kind="stable")[:top]
    return float(x[token]), [(int(i), float(x[i])) for i in best]
