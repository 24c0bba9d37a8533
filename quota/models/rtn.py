"""Round-to-nearest quantization in memory: fixed orthogonal transforms, no calibration data. The fallback and the
baseline."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from quota.core.formats import DEFAULT, MODULES, Scheme
from quota.models import find_family
from quota.models.quantize import Shapes, check_modules, linear_paths, quantize_structure
from quota.nn.key_bias import QuantBiasedAttention
from quota.nn.linear import RoundedLinear
from quota.quant.transform import hadamard


@torch.no_grad()
def quantize_rtn(
    model: Any,
    modules: Collection[str] = MODULES,
    *,
    transforms: bool = True,
    clip: float = 1.0,
    scheme: Scheme = DEFAULT,
) -> Any:
    """Quantize a float model in place to a scheme by rounding to nearest; returns it.

    transforms: spread outliers with Hadamard/DCT transforms (Kronecker-factored; over heads before output projections;
    over head_dim after the rotary embedding) where the scheme has any. False: no transforms at all. clip in (0, 1]:
    activation clip of every linear.
    """
    chosen, family = check_modules(modules), find_family(model)
    weights = {
        path: _floats([model.get_submodule(part) for part in parts])
        for path, parts in linear_paths(family, chosen).items()
    }
    layers = family.blocks("decoder")
    shapes: Shapes | None = None if transforms else {f"{path}.self_attn.k_bias": () for path in layers}
    quantize_structure(model, chosen, shapes, scheme)
    for path, (parts, bias) in weights.items():
        linear = model.get_submodule(path)
        if isinstance(linear, RoundedLinear):
            linear.round_parts(parts, bias)
        else:
            linear.round_from(torch.cat(parts), bias, clip)
    for path in layers if "llm" in chosen else ():
        attention = model.get_submodule(f"{path}.self_attn")
        for matrix in (attention.q_transform, attention.k_transform):
            if matrix is not None:
                matrix.copy_(hadamard(family.head_dim))
        if isinstance(attention, QuantBiasedAttention):
            _part_key_bias(attention)
    return model


def _part_key_bias(attention: QuantBiasedAttention) -> None:
    bias: Any = attention.qkv_proj.bias
    first = attention.heads * attention.head_dim
    rows = bias[first : first + attention.k_bias.numel()]
    attention.k_bias.copy_(rows.view_as(attention.k_bias))
    rows.zero_()


def _floats(linears: list[nn.Linear]) -> tuple[list[Tensor], Tensor | None]:
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears]).float()
    return [linear.weight.float() for linear in linears], bias
