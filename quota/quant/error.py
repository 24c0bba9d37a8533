"""Error measures."""

from __future__ import annotations

import math

from torch import Tensor


def mse(got: Tensor, want: Tensor) -> float:
    """Mean squared error, accumulated in float64."""
    return float((got.double() - want.double()).square().mean())


def sqnr_db(got: Tensor, want: Tensor) -> float:
    """Signal to quantization noise in dB; infinity where they are equal."""
    noise = float((got.double() - want.double()).square().sum())
    signal = float(want.double().square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise)
