"""Round-to-nearest quantization in memory: fixed orthogonal transforms, no calibration data. The fallback and the
baseline."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from quota.models import find_family
from quota.models.quantize import Shapes, check_modules, float_linears, quantize_structure
from quota.nn.key_bias import QuantBiasedAttention
from quota.nn.linear import QuantLinear
from quota.quant.affine import quantize_weight
from quota.quant.transform import apply_kronecker, hadamard


@torch.no_grad()
def quantize_rtn(
    model: Any, modules: Collection[str] = ("vision", "projector", "llm"), *, transforms: bool = True, clip: float = 1.0
) -> Any:
    """Quantize a float model in place to W4A4KV4 by rounding to nearest; returns it.

    transforms: spread outliers with Hadamard/DCT transforms (Kronecker-factored; over heads before output projections;
    over head_dim after the rotary embedding). False: no transforms at all. clip in (0, 1]: activation clip of every
    group.
    """
    chosen, family = check_modules(modules), find_family(model)
    weights = {
        f"{path}.{group.name}": _stacked(float_linears(model, path, group))
        for path, group in family.group_paths(chosen)
    }
    layers = family.blocks("decoder")
    shapes: Shapes | None = None if transforms else {f"{path}.self_attn.k_bias": () for path in layers}
    quantize_structure(model, chosen, shapes)
    for path, (weight, bias) in weights.items():
        linear: Any = model.get_submodule(path)
        fill(linear, weight, bias, clip)
    for path in layers if "llm" in chosen else ():
        attention = model.get_submodule(f"{path}.self_attn")
        if transforms:
            _fill_heads(attention, family.head_dim)
        if isinstance(attention, QuantBiasedAttention):
            _part_key_bias(attention)
    return model


def _part_key_bias(attention: QuantBiasedAttention) -> None:
    bias: Any = attention.qkv_proj.bias
    first = attention.heads * attention.head_dim
    rows = bias[first : first + attention.k_bias.numel()]
    attention.k_bias.copy_(rows.view_as(attention.k_bias))
    rows.zero_()


def _stacked(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears]).float()
    return torch.cat([linear.weight for linear in linears]).float(), bias


def fill(group: QuantLinear, weight: Tensor, bias: Tensor | None, clip: float) -> None:
    """Set a group from a float weight [N, K]: Hadamard factors where it has any. They are orthogonal, so P^-T = P and
    W' = W P."""
    for factor in (group.left, group.right):
        if factor is not None:
            factor.copy_(hadamard(factor.shape[0]))
    left, right = (None if factor is None else factor.double() for factor in (group.left, group.right))
    w_q, w_scale = quantize_weight(apply_kronecker(weight.double(), left, right).float())
    group.w_q.copy_(w_q)
    group.w_scale.copy_(w_scale)
    group.clip.fill_(clip)
    if bias is not None and group.bias is not None:
        group.bias.copy_(bias)
    group.forget()


def _fill_heads(attention: Any, head_dim: int) -> None:
    attention.q_transform.copy_(hadamard(head_dim))
    attention.k_transform.copy_(hadamard(head_dim))
