"""Products with transform factors in exact integers: rows and factors become 16-bit fixed point, sums are int32, and
one rounding stands between two factors.

So a result depends on its inputs alone: no order of summation, tile, thread, instruction set or device can change it,
and int16 pairs (`vpmaddwd`, `vpdpwssd`) or signed bytes (matrix units) give it at integer speed.

The bound: a value is at most 32639 in magnitude and the magnitudes of a factor's column sum to at most 65536, so every
sum of products, whole or in part, is at most 32639 * 65536 < 2^31 in magnitude, at any size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 127 * 257  # of a fixed-point value: what two signed bytes hold
LARGEST_COLUMN = 65536  # of the sum of the magnitudes of a factor's column
SMALLEST_REACH = 2.0**-100  # rows that reach no further are zeros: 32639 / reach stays finite
EXPONENTS = (-60, 30)  # of a factor; with the shift of at most 16 a float32 takes their sum


def fixed_factor(matrix: Tensor) -> tuple[Tensor, int]:
    """Square float matrix [n, n] -> (int16 [n, n], exponent): matrix ~ integers * 2^exponent, rounded half to even;
    made on the CPU, so that devices agree, and put beside the matrix.

    The exponent is the least that keeps the bounds, so the largest column has 15 to 16 bits and a matrix that was
    rounded before is returned exactly. Of n equal magnitudes each has 16 - log2(n) bits. ValueError for values that
    are not finite or too large.
    """
    m = matrix.detach().cpu().double()
    reach = float(max(m.abs().max() / LARGEST, m.abs().sum(0).max() / LARGEST_COLUMN)) if m.numel() else 0.0
    if not math.isfinite(reach) or reach > 2.0 ** EXPONENTS[1] / 2:
        raise ValueError(f"factor: expected finite values whose columns sum to less than 2^45, got {reach:g} * 65536")
    exponent = EXPONENTS[0] if reach == 0 else max(EXPONENTS[0], math.ceil(math.log2(reach)))
    while True:
        fixed = torch.round(m * 2.0**-exponent)
        if not m.numel() or (fixed.abs().max() <= LARGEST and fixed.abs().sum(0).max() <= LARGEST_COLUMN):
            return fixed.to(torch.int16).to(matrix.device), exponent
        exponent += 1


def rounded_factor(matrix: Tensor) -> Tensor:
    """The float matrix that `fixed_factor` stands for, in the dtype of `matrix`: float32 holds it exactly."""
    fixed, exponent = fixed_factor(matrix)
    return fixed.to(matrix.dtype) * 2.0**exponent


def fixed_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [M, K] -> (integers as float64 [M, K], unit float32 [M]): round(x * (32639 / max|x|)), half to even, and
    max|x| / 32639.

    A row with a value that is not finite, or with none above 2^-100, becomes zeros; its unit still tells.
    """
    reach = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    usable = (reach > SMALLEST_REACH) & reach.isfinite()
    largest = torch.full_like(reach, LARGEST)  # with a number torch may multiply by a reciprocal
    factor = torch.where(usable, largest / reach, 0.0)
    return torch.where(usable[:, None], torch.round(x * factor[:, None]), 0.0).double(), reach / largest


def to_16_bits(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Integers as float64 [M, K] below 2^31 -> (the same, rounded, [M, K], shift int64 [M]): (sum + half) >> shift with
    half = 2^(shift - 1), or nothing for shift 0; the shift is the least that leaves the row's magnitudes at most
    32639."""
    whole = sums.long()
    largest = whole.abs().amax(-1) if whole.shape[-1] else whole.new_zeros(len(whole))
    shift = torch.zeros_like(largest)
    for _ in range(17):
        shift = torch.where((largest + (1 << shift >> 1)) >> shift > LARGEST, shift + 1, shift)
    return ((whole + (1 << shift >> 1)[:, None]) >> shift[:, None]).double(), shift


def fixed_kronecker(x: Tensor, left: tuple[Tensor, int] | None, right: tuple[Tensor, int] | None) -> Tensor:
    """float32 [M, K] through factors as `fixed_factor` makes them, at least one, l * r = K -> float32 [M, K]:
    y = left^T X right on X = x.view(l, r).

    Steps: `fixed_rows`; the sums with left; where right follows, `to_16_bits` of the row's l * r sums; the sums with
    right; then float32(sum) * (unit * 2^(exponents + shift)).
    """
    m, k = x.shape
    integers, unit = fixed_rows(x)
    rows = left[0].shape[0] if left is not None else k // right[0].shape[0]  # type: ignore[index]
    exponent = torch.zeros(m, dtype=torch.int64, device=x.device)
    y = integers.view(m, rows, k // rows)  # float64 holds the integers and their sums exactly, in any order
    if left is not None:
        y = left[0].double().T @ y
        exponent += left[1]
        if right is not None:
            y, shift = to_16_bits(y.reshape(m, k))
            y, exponent = y.view(m, rows, k // rows), exponent + shift
    if right is not None:
        y = y @ right[0].double()
        exponent += right[1]
    power = torch.ldexp(torch.ones_like(unit), exponent)
    return y.reshape(m, k).float() * (unit * power)[:, None]
