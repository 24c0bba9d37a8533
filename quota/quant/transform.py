"""Kronecker-factored transforms. Row convention: x (left (x) right), computed as left^T X right on X = x.view(l, r)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def decompose(n: int) -> tuple[int, int]:
    """n = l * r with l <= r as square as possible (4096 -> 64 x 64, 11008 -> 86 x 128); a prime gives (1, n)."""
    for left in range(math.isqrt(n), 0, -1):
        if n % left == 0:
            return left, n // left
    raise ValueError(f"n: expected a positive number, got {n}")


def hadamard(n: int) -> Tensor:
    """Orthogonal float64 [n, n]: Sylvester-Hadamard of n's power of two, times a DCT-II of its odd part."""
    power = n & -n
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < power:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    odd = n // power
    k = torch.arange(odd, dtype=torch.float64)
    dct = torch.cos(math.pi / odd * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / odd)
    dct[0] /= math.sqrt(2)
    return torch.kron(dct, h / math.sqrt(power))


def apply_kronecker(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """float [..., K] -> [..., K]; left [l, l] and right [r, r] with l * r = K. A missing factor is the identity."""
    k = x.shape[-1]
    if left is None and right is None:
        return x
    rows = left.shape[0] if left is not None else k // right.shape[0]  # type: ignore[union-attr]
    y = x.unflatten(-1, (rows, k // rows))
    if left is not None:
        y = left.T @ y
    if right is not None:
        y = y @ right
    return y.flatten(-2)


def inverse_on_weight(w: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """[N, K] -> W' with (x P) W'^T = x W^T for P = left (x) right; inverses in float64."""
    li = None if left is None else torch.linalg.inv(left.double()).T
    ri = None if right is None else torch.linalg.inv(right.double()).T
    return apply_kronecker(w.double(), li, ri).to(w.dtype)
