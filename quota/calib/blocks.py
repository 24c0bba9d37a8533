"""Calibration blocks: upstream float blocks whose linears are replaced by projection groups and whose attention is ours.

The upstream forward stays. Layout of groups, names and merges per block kind:

| block | group | reads | merged |
|---|---|---|---|
| decoder | self_attn.qkv_proj, mlp.gate_up_proj | a norm's output | diag into the norm, P_v into v rows |
| decoder | self_attn.o_proj | heads | P_v inverse into columns; online left factor mixes heads |
| decoder | mlp.down_proj | gate * up | diag into up rows (their w_scale) |
| vision | self_attn.qkv_proj, self_attn.out_proj, mlp.fc1 | as above, LayerNorm with bias | as above |
| vision, projector | mlp.fc2, linear_1, linear_2 | a nonlinearity or features | no diag |
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from quota.calib.flatquant import GroupPart, HeadTransforms, ProjectionGroup
from quota.quant.transform import decompose

ATTENTION = "quota_calibration"


@dataclass
class Batch:
    """Right-padded hidden states. hidden [B, S, C] float32; valid, visual [B, S] bool; positions [B, S] int64 (decoder only, else None)."""

    hidden: Tensor
    valid: Tensor
    positions: Tensor | None = None
    visual: Tensor | None = None


@dataclass(frozen=True)
class _GroupPlan:
    name: str
    parts: tuple[str, ...]
    merge: str | None = None  # name of the norm that absorbs diag; "up" = rows of the gate/up group; None = no diag
    value: str | None = None  # "rows": produces V; "columns": consumes the attention output


_DECODER = (
    _GroupPlan("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "rows"),
    _GroupPlan("self_attn.o_proj", ("self_attn.o_proj",), None, "columns"),
    _GroupPlan("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    _GroupPlan("mlp.down_proj", ("mlp.down_proj",), "up"),
)
_VISION = (
    _GroupPlan("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "layer_norm1", "rows"),
    _GroupPlan("self_attn.out_proj", ("self_attn.out_proj",), None, "columns"),
    _GroupPlan("mlp.fc1", ("mlp.fc1",), "layer_norm2"),
    _GroupPlan("mlp.fc2", ("mlp.fc2",)),
)
_PROJECTOR = (_GroupPlan("linear_1", ("linear_1",)), _GroupPlan("linear_2", ("linear_2",)))
_PLANS = {"decoder": _DECODER, "vision": _VISION, "projector": _PROJECTOR}


def calibration_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention function of calibration blocks: P_h and KV fake quantization, then exact attention. q, k, v [B, heads, T, D] -> [B, T, heads, D].

    No mask is used: batches are padded on the right, so causal attention never lets a real token see padding.
    """
    heads: HeadTransforms | None = getattr(module, "quota_heads", None)
    trace: list[tuple[Tensor, Tensor]] | None = getattr(module, "quota_trace", None)
    if trace is not None:
        trace.append((query, key))
    if heads is not None:
        query, key, value = heads.attend(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=bool(module.is_causal), scale=kwargs.get("scaling"), enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


class Block(nn.Module):
    """One float block of the model; `quantize_linears` turns it into a calibration block in place.

    layer: the upstream module with real float32 weights. kind: "decoder", "vision" or "projector". path: its name in the model. config: the text or
    vision configuration. rotary: the decoder's rotary embedding module.
    """

    def __init__(self, layer: nn.Module, kind: str, path: str, config: Any, rotary: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.kind, self.path, self.rotary = layer, kind, path, rotary
        self.config = copy.deepcopy(config)
        self.groups = nn.ModuleDict()
        self.heads: HeadTransforms | None = None
        if kind != "projector":
            AttentionInterface.register(ATTENTION, calibration_attention)
            self.config._attn_implementation = ATTENTION
            layer.get_submodule("self_attn").config = self.config
        self.requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        """Block output [B, S, C]; rows beyond `valid` are meaningless."""
        if self.kind == "projector":
            return self.layer(batch.hidden)
        if self.kind == "vision":
            return self.layer(batch.hidden, attention_mask=None)
        assert self.rotary is not None
        return self.layer(batch.hidden, position_embeddings=self.rotary(batch.hidden, batch.positions), attention_mask=None)

    def quantize_linears(self) -> None:
        """Replace the linears by projection groups; parameters that learn are those of `groups` and `heads` only."""
        if self.kind != "projector":
            attention: Any = self.layer.get_submodule("self_attn")
            self.heads = HeadTransforms(int(attention.head_dim), quantize_kv=self.kind == "decoder").to(_device(self.layer))
            attention.quota_heads = self.heads
        for plan in _PLANS[self.kind]:
            linears = [self.layer.get_submodule(part) for part in plan.parts]
            group = self._build_group(plan, linears)  # type: ignore[arg-type]
            self.groups[_key(plan.name)] = group
            for index, part in enumerate(plan.parts):
                parent, _, leaf = part.rpartition(".")
                setattr(self.layer.get_submodule(parent), leaf, GroupPart(group, index))

    def _build_group(self, plan: _GroupPlan, linears: list[nn.Linear]) -> ProjectionGroup:
        if plan.value == "columns":
            assert self.heads is not None
            left, right = linears[0].in_features // self.heads.value.shape[0], 0
        else:
            left, right = decompose(linears[0].in_features)
        start = sum(linear.out_features for linear in linears[:-1])
        rows = slice(start, start + linears[-1].out_features) if plan.value == "rows" else None
        left = 0 if left == 1 else left
        return ProjectionGroup(linears, left, right, plan.merge is not None, self.heads if plan.value else None, rows)

    def set_mode(self, mode: str) -> None:
        """Switch every group and the head transforms (see flatquant.MODES)."""
        for group in self.projection_groups():
            group.mode = mode
        if self.heads is not None:
            self.heads.mode = mode

    def projection_groups(self) -> list[ProjectionGroup]:
        """The groups in the order they run; empty while the block is float."""
        return list(self.groups.values())  # type: ignore[arg-type]

    def _group(self, plan: _GroupPlan) -> ProjectionGroup:
        return self.groups[_key(plan.name)]  # type: ignore[return-value]

    def matrices(self) -> list[nn.Parameter]:
        """Learned transforms and diagonals."""
        return [p for name, p in self.named_parameters() if p.requires_grad and not name.endswith("clip")]

    def clips(self) -> list[nn.Parameter]:
        """Learned clip logits."""
        return [p for name, p in self.named_parameters() if p.requires_grad and name.endswith("clip")]

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Record every group's input (and K, V) while running in mode "float"."""
        members: list[Any] = [*self.projection_groups(), *([self.heads] if self.heads is not None else [])]
        for member in members:
            member.observed = []
        try:
            yield
        finally:
            for member in members:
                member.observed = None

    def freeze(self) -> None:
        """Quantize the merged weights; mode "frozen" then runs the exported integers."""
        for group in self.projection_groups():
            group.freeze()

    def export(self) -> dict[str, Tensor]:
        """Checkpoint tensors of the quantized block under their full names; call `freeze` first. Every tensor on the CPU, floats float32."""
        out: dict[str, Tensor] = {}
        for plan in _PLANS[self.kind]:
            for name, tensor in self._group(plan).export().items():
                out[f"{self.path}.{plan.name}.{name}"] = tensor
        if self.heads is not None:
            out.update({f"{self.path}.self_attn.{name}": tensor for name, tensor in self.heads.export().items()})
        for name, tensor in self.layer.named_parameters():  # what is left of the float block: the norms
            if "." in name and name.rpartition(".")[0] in _NORMS:
                out[f"{self.path}.{name}"] = tensor.detach().cpu().float().clone()
        for plan in _PLANS[self.kind]:
            diag = self._group(plan).diag()
            if diag is None:
                continue
            if plan.merge == "up":  # up's rows divided by c: its integers stay, its scales change
                scale = out[f"{self.path}.mlp.gate_up_proj.w_scale"]
                scale[-diag.numel() :] /= diag
                bias = out.get(f"{self.path}.mlp.gate_up_proj.bias")
                if bias is not None:
                    bias[-diag.numel() :] /= diag
                continue
            for name in ("weight", "bias"):
                key = f"{self.path}.{plan.merge}.{name}"
                if key in out:
                    out[key] /= diag
        return out


_NORMS = frozenset({"input_layernorm", "post_attention_layernorm", "layer_norm1", "layer_norm2"})


def _key(name: str) -> str:
    return name.replace(".", "_")


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
