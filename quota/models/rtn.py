"""Round-to-nearest quantization in memory: fixed orthogonal transforms, no calibration data. The fallback and the baseline."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from quota.models import ArchSpec, find_family, submodule
from quota.models.quantize import Shapes, check_modules, quantize_structure
from quota.nn.key_bias import QuantBiasedAttention
from quota.nn.linear import QuantLinear
from quota.quant.affine import quantize_weight
from quota.quant.transform import apply_kronecker, hadamard


@torch.no_grad()
def quantize_rtn(model: Any, modules: Collection[str] = ("vision", "projector", "llm"), *, transforms: bool = True, clip: float = 1.0) -> Any:
    """Quantize a float model in place to W4A4KV4 by rounding to nearest; returns it.

    transforms: spread outliers with Hadamard/DCT transforms (Kronecker-factored; over heads before output projections; over head_dim
    after the rotary embedding). False: no transforms at all. clip in (0, 1]: activation clip of every group.
    """
    chosen, arch = check_modules(modules), find_family(model)
    weights = {path: _float_group(submodule(model, path.rpartition(".")[0]), parts) for path, parts in groups(arch, chosen).items()}
    shapes: Shapes | None = None if transforms else {f"{arch.decoder_layer(i)}.self_attn.k_bias": () for i in range(arch.layers)}
    quantize_structure(model, chosen, shapes)
    for path, (weight, bias) in weights.items():
        group: Any = model.get_submodule(path)
        fill(group, weight, bias, clip)
    for index in range(arch.layers) if "llm" in chosen else ():
        attention = model.get_submodule(f"{arch.decoder_layer(index)}.self_attn")
        if transforms:
            _fill_heads(attention, arch.head_dim)
        if isinstance(attention, QuantBiasedAttention):
            _part_key_bias(attention)
    return model


def _part_key_bias(attention: QuantBiasedAttention) -> None:
    bias: Any = attention.qkv_proj.bias
    first = attention.heads * attention.head_dim
    rows = bias[first : first + attention.k_bias.numel()]
    attention.k_bias.copy_(rows.view_as(attention.k_bias))
    rows.zero_()


def groups(arch: ArchSpec, chosen: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Path of each projection group -> names of the float linears it fuses, in row order."""
    groups: dict[str, tuple[str, ...]] = {}
    if "llm" in chosen:
        for path in (arch.decoder_layer(i) for i in range(arch.layers)):
            groups[f"{path}.self_attn.qkv_proj"] = ("q_proj", "k_proj", "v_proj")
            groups[f"{path}.self_attn.o_proj"] = ("o_proj",)
            groups[f"{path}.mlp.gate_up_proj"] = ("gate_proj", "up_proj")
            groups[f"{path}.mlp.down_proj"] = ("down_proj",)
    if arch.name == "qwen2_5_vl":
        return groups | _tower_groups(arch, chosen)
    if "vision" in chosen:
        for path in (arch.vision_layer(i) for i in range(arch.vision_layers_used)):
            groups[f"{path}.self_attn.qkv_proj"] = ("q_proj", "k_proj", "v_proj")
            groups[f"{path}.self_attn.out_proj"] = ("out_proj",)
            groups[f"{path}.mlp.fc1"], groups[f"{path}.mlp.fc2"] = ("fc1",), ("fc2",)
    if "projector" in chosen:
        groups |= {f"{arch.projector_path}.{name}": (name,) for name in ("linear_1", "linear_2")}
    return groups


def _tower_groups(arch: ArchSpec, chosen: Collection[str]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, tuple[str, ...]] = {}
    for path in (arch.vision_layer(i) for i in range(arch.vision_layers_used) if "vision" in chosen):
        groups |= {f"{path}.attn.qkv": ("qkv",), f"{path}.attn.proj": ("proj",)}
        groups |= {f"{path}.mlp.gate_up_proj": ("gate_proj", "up_proj"), f"{path}.mlp.down_proj": ("down_proj",)}
    if "projector" in chosen:
        groups |= {f"{arch.projector_path}.mlp.{name}": (name,) for name in ("0", "2")}
    return groups


def _float_group(parent: nn.Module, parts: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    linears: list[Any] = [getattr(parent, part) for part in parts]
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears]).float()
    return torch.cat([linear.weight for linear in linears]).float(), bias


def fill(group: QuantLinear, weight: Tensor, bias: Tensor | None, clip: float) -> None:
    """Set a group from a float weight [N, K]: Hadamard factors where it has any. They are orthogonal, so P^-T = P and W' = W P."""
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
