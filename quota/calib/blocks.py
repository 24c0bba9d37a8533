"""Calibration blocks: upstream float blocks whose linears are replaced by projection groups and whose attention is
ours.

The upstream forward stays. Which groups a block has, their names and what absorbs a diagonal:
`quota.models.base.Group`.
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
from quota.core.formats import DEFAULT, Scheme
from quota.models.base import Family, Group, Part
from quota.models.images import PatchGrid
from quota.ops.qkv_append import apply_rotary
from quota.quant.transform import decompose

ATTENTION = "quota_calibration"


@dataclass
class Batch:
    """Right-padded hidden states. hidden [B, S, C] float32; valid, visual [B, S] bool; positions [B, S] (or [B, S, 3]
    under M-RoPE) int64 (decoder only, else None); grids: of each image (towers of dynamic resolution only)."""

    hidden: Tensor
    valid: Tensor
    positions: Tensor | None = None
    visual: Tensor | None = None
    grids: list[PatchGrid] | None = None


def calibration_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention function of calibration blocks: P_h and KV fake quantization, then exact attention. q, k, v [B, heads,
    T, D] -> [B, T, heads, D].

    No mask is used: batches are padded on the right, so causal attention never lets a real token see padding.
    """
    heads: HeadTransforms | None = getattr(module, "quota_heads", None)
    trace: list[tuple[Tensor, Tensor]] | None = getattr(module, "quota_trace", None)
    if trace is not None:
        trace.append((query, key))
    if heads is not None:
        query, key, value = heads.attend(query, key, value, getattr(module, "quota_apart", None))
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=bool(module.is_causal), scale=kwargs.get("scaling"), enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous(), None


class Block(nn.Module):
    """One float block of the model; `quantize_linears` turns it into a calibration block in place.

    layer: the upstream module with real float32 weights. kind: its part. path: its name in the model. rotary: the
    decoder's rotary embedding module.
    """

    def __init__(
        self, layer: nn.Module, kind: Part, path: str, family: Family, rotary: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layer, self.kind, self.path, self.family, self.rotary = layer, kind, path, family, rotary
        self.plans = family.groups[kind]
        self.config = copy.deepcopy(family.config_of(kind))
        self.groups = nn.ModuleDict()
        self.heads: HeadTransforms | None = None
        self.key_bias: Tensor | None = None
        if kind != "projector":
            AttentionInterface.register(ATTENTION, calibration_attention)
            self.config._attn_implementation = ATTENTION
            self.attention.config = self.config
        self.requires_grad_(False)

    @property
    def attention(self) -> Any:
        """The block's attention module."""
        return self.layer.get_submodule(self.family.attention[self.kind])

    def forward(self, batch: Batch) -> Tensor:
        """Block output [B, S, C]; rows beyond `valid` are meaningless."""
        if self.kind == "projector":
            return self.family.projector_block(self.layer, batch.hidden)
        if self.kind == "vision":
            return self.family.tower_block(
                self.layer, int(self.path.rpartition(".")[2]), batch.hidden, batch.valid, batch.grids
            )
        assert self.rotary is not None and batch.positions is not None
        positions = batch.positions if batch.positions.ndim == 2 else batch.positions.permute(2, 0, 1)
        rotary = self.rotary(batch.hidden, positions)
        if self.key_bias is not None:
            everywhere = self.key_bias[None, :, None].expand(len(batch.hidden), -1, batch.hidden.shape[1], -1)
            self.attention.quota_apart = apply_rotary(everywhere, *rotary)
        return self.layer(batch.hidden, position_embeddings=rotary, attention_mask=None)

    def quantize_linears(self, scheme: Scheme = DEFAULT) -> None:
        """Replace the linears by projection groups of a scheme; parameters that learn are those of `groups` and
        `heads` only."""
        if self.kind != "projector":
            attention = self.attention
            self.heads = HeadTransforms(int(attention.head_dim), scheme.kv if self.kind == "decoder" else None)
            self.heads.to(_device(self.layer))
            attention.quota_heads = self.heads
            if self.kind == "decoder" and attention.k_proj.bias is not None:
                self.key_bias = attention.k_proj.bias.detach().view(-1, attention.head_dim).clone()
        for plan in self.plans:
            linears = [self.layer.get_submodule(part) for part in plan.parts]
            group = self._build_group(plan, linears, scheme)  # type: ignore[arg-type]
            self.groups[_key(plan.name)] = group
            for index, part in enumerate(plan.parts):
                parent, _, leaf = part.rpartition(".")
                setattr(self.layer.get_submodule(parent), leaf, GroupPart(group, index))

    def _build_group(self, plan: Group, linears: list[nn.Linear], scheme: Scheme) -> ProjectionGroup:
        if plan.value == "columns":
            assert self.heads is not None
            left, right = linears[0].in_features // self.heads.value.shape[0], 0
        else:
            left, right = decompose(linears[0].in_features)
        total = sum(linear.out_features for linear in linears)
        rows = (
            slice(total - (total // 3 if plan.fused else linears[-1].out_features), total)
            if plan.value == "rows"
            else None
        )
        left = 0 if left == 1 else left
        heads = self.heads if plan.value else None
        return ProjectionGroup(linears, left, right, plan.absorbs is not None, heads, rows, scheme)

    def set_mode(self, mode: str) -> None:
        """Switch every group and the head transforms (see flatquant.MODES)."""
        for group in self.projection_groups():
            group.mode = mode
        if self.heads is not None:
            self.heads.mode = mode

    def projection_groups(self) -> list[ProjectionGroup]:
        """The groups in the order they run; empty while the block is float."""
        return list(self.groups.values())  # type: ignore[arg-type]

    def _group(self, plan: Group) -> ProjectionGroup:
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
        """Checkpoint tensors of the quantized block under their full names; call `freeze` first. Every tensor on the
        CPU, floats float32."""
        out: dict[str, Tensor] = {}
        for plan in self.plans:
            for name, tensor in self._group(plan).export().items():
                out[f"{self.path}.{plan.name}.{name}"] = tensor
        if self.heads is not None:
            out.update({f"{self.path}.self_attn.{name}": tensor for name, tensor in self.heads.export().items()})
        if self.key_bias is not None:  # it is added to the scores, not to the keys
            out[f"{self.path}.self_attn.k_bias"] = self.key_bias.cpu().float().clone()
            first = self.attention.config.num_attention_heads * self.attention.head_dim
            out[f"{self.path}.self_attn.qkv_proj.bias"][first : first + self.key_bias.numel()] = 0
        for name, tensor in self.layer.named_parameters():  # what is left of the float block: the norms
            if name.rpartition(".")[0] in self.family.norms[self.kind]:
                out[f"{self.path}.{name}"] = tensor.detach().cpu().float().clone()
        for plan in self.plans:
            diag = self._group(plan).diag()
            if diag is None:
                continue
            if plan.absorbs == "up":  # up's rows divided by c: its integers stay, its scales change
                scale = out[f"{self.path}.mlp.gate_up_proj.w_scale"]
                scale[-diag.numel() :] /= diag
                bias = out.get(f"{self.path}.mlp.gate_up_proj.bias")
                if bias is not None:
                    bias[-diag.numel() :] /= diag
                continue
            for name in ("weight", "bias"):
                key = f"{self.path}.{plan.absorbs}.{name}"
                if key in out:
                    out[key] /= diag
        return out


def _key(name: str) -> str:
    return name.replace(".", "_")


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
