"""GPTQ: rounding one column after the other, each column's error compensated by the columns not yet rounded.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023).
A row w of the weight is rounded to q with little (w - q) H (w - q)^T, H = 2/n sum x x^T over the layer's inputs: the
layer's squared output error. With U the upper Cholesky factor of the inverse of the damped H, rounding column i with
error e = (w_i - q_i) / U_ii is best answered by w_j -= e U_ij for all j > i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quota.core.formats import INT4_GROUPS, Format
from quota.quant.grouped import grid_of, groups_of, round_to, value_of

_DAMPINGS = 4  # times the damping may grow tenfold before a Hessian is refused


class Hessian:
    """H of one layer, summed batch by batch: `value` float64 [K, K]."""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(k, k, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """x [rows, K]: inputs of the layer. Products in float32, as the inputs are; their sum over batches in
        float64."""
        x = x.float()
        self.total += x.T @ x
        self.rows += len(x)

    @property
    def value(self) -> Tensor:
        """2/n sum x x^T; zero before the first input."""
        return self.total * (2.0 / max(self.rows, 1))


@dataclass(frozen=True)
class GptqOptions:
    """damping: added to the diagonal of H, in units of
    its mean. by_activation: round columns with the largest diagonal of H first ("activation order"); every group's grid
    then comes from the untouched weight, so that groups stay contiguous along K."""

    damping: float = 0.01
    by_activation: bool = False


def gptq(
    weight: Tensor, hessian: Tensor, form: Format = INT4_GROUPS, options: GptqOptions = GptqOptions()
) -> tuple[Tensor, Tensor, Tensor]:
    """weight float [N, K], hessian float64 [K, K] -> (codes uint8 [N, K], scale float32 [N, G], zero uint8 [N, G]) in
    groups along K.

    An input that was always zero counts for nothing; its weights are rounded to nearest. ValueError for a Hessian that
    is not positive definite however it is damped (not finite, or not symmetric). Deterministic for a given machine and
    thread count.
    """
    n, k = weight.shape
    group = form.group or k
    if hessian.shape != (k, k):
        raise ValueError(f"hessian: expected [{k}, {k}] for a weight [{n}, {k}], got {list(hessian.shape)}")
    w, h = weight.detach().double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    order = (
        torch.argsort(h.diagonal(), descending=True, stable=True)
        if options.by_activation
        else torch.arange(k, device=w.device)
    )
    factor = _inverse_factor(h[order][:, order], options.damping)
    scale, zero = grid_of(groups_of(weight.float(), form), form)
    w = w[:, order]
    codes = torch.zeros(n, k, dtype=torch.uint8, device=w.device)
    for first in range(0, k, group):  # the rest of the weight hears of a block's errors at once
        last = min(first + group, k)
        if not options.by_activation:  # the grid of what earlier errors made of the group
            at = first // group
            scale[:, at], zero[:, at] = grid_of(groups_of(w[:, first:last].float(), form)[:, 0], form)
        errors = torch.zeros(n, last - first, dtype=torch.float64, device=w.device)
        for i in range(first, last):
            column = int(order[i])
            grid = scale[:, column // group], zero[:, column // group]
            codes[:, column] = q = round_to(w[:, i].float(), *grid, form)
            error = (w[:, i] - value_of(q, *grid).double()) / factor[i, i]
            errors[:, i - first] = error
            w[:, i + 1 : last] -= error[:, None] * factor[i, i + 1 : last]
        w[:, last:] -= errors @ factor[first:last, last:]
    return codes, scale, zero


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of H + damping * mean(diagonal) * I."""
    mean = h.diagonal().mean()
    for attempt in range(_DAMPINGS):
        damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper
    raise ValueError(
        f"hessian: not positive definite even with a damping of {damping * 10 ** (_DAMPINGS - 1):g}; the layer's inputs"
        " are not finite"
    )


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr((w - q) H (w - q)^T) / 2: the mean over inputs of the layer's squared output error, summed over its outputs.
    Float64."""
    difference = weight.double() - rounded.double()
    return float(((difference @ hessian.double()) * difference).sum()) / 2
