"""Calibration blocks: upstream float blocks whose linears are replaced by projection groups and whose attention is
ours.

The upstream forward stays. Which groups a block has, their names and what absorbs a diagonal:
`quota.models.base.Group`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from quota.calib.flatquant import GroupPart, HeadTransforms, ProjectionGroup, ValueMerge
from quota.calib.precision import products_in
from quota.core.formats import DEFAULT, Scheme
from quota.models.base import Family
from quota.models.groups import Group, Part
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

    def to(self, device: torch.device) -> Batch:
        """On that device; from pinned memory the copy is on its way when this returns."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In memory that a GPU reads by itself."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        positions, visual = (None if side is None else move(side) for side in (self.positions, self.visual))
        return Batch(move(self.hidden), move(self.valid), positions, visual, self.grids)


class CalibrationAttention:
    """What runs where upstream's attention would: P_h and KV fake quantization, then exact attention.

    Batches are padded on the right, so causal attention needs no mask to keep padding from a real token.
    heads: once the block is quantized. apart: of the call at hand, the part of the keys that is never quantized.
    trace: (query, key) of every call, where it is recorded.
    """

    def __init__(self) -> None:
        self.heads: HeadTransforms | None = None
        self.apart: Tensor | None = None
        self.trace: list[tuple[Tensor, Tensor]] | None = None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, scaling: float | None
    ) -> tuple[Tensor, None]:
        """q, k, v [B, heads, T, D], mask [B, 1, 1, T] of keys that are real or None -> [B, T, heads, D]."""
        if self.trace is not None:
            self.trace.append((query, key))
        if self.heads is not None:
            query, key, value = self.heads.attend(query, key, value, self.apart)
        grouped = query.shape[1] != key.shape[1]
        out = functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous(), None


# transformers finds an attention function by a name in the configuration, one for the whole process, and hands it the
# attention module that called. So one function is registered, and it closes over the blocks' own attentions, by that
# module: upstream's modules carry nothing of ours, and an entry goes with its block.
_ATTENTIONS: WeakKeyDictionary[nn.Module, CalibrationAttention] = WeakKeyDictionary()


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    causal = bool(module.is_causal)
    return _ATTENTIONS[module](query, key, value, attention_mask, causal=causal, scaling=kwargs.get("scaling"))


AttentionInterface.register(ATTENTION, _attend)


class Block(nn.Module):
    """One float block of the model; `quantize_linears` turns it into a calibration block in place.

    layer: the upstream module with real float32 weights. kind: its part. path: its name in the model. rotary: the
    decoder's rotary embedding module. dtype: of the products of its linears and of its attention; what is learned,
    rounded and handed on is float32 in any case.
    """

    dtype = torch.float32

    def __init__(
        self, layer: nn.Module, kind: Part, path: str, family: Family, rotary: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layer, self.kind, self.path, self.family, self.rotary = layer, kind, path, family, rotary
        self.plans = family.groups[kind]
        self.config = copy.deepcopy(family.config_of(kind))
        self.groups: dict[str, ProjectionGroup] = {}  # registered where the linears stood
        self.attend = CalibrationAttention()
        self.heads: HeadTransforms | None = None
        self.key_bias: Tensor | None = None
        if kind != "projector":
            self.config._attn_implementation = ATTENTION
            self.attention.config = self.config
            _ATTENTIONS[self.attention] = self.attend
        self.requires_grad_(False)

    @property
    def attention(self) -> Any:
        """The block's attention module."""
        return self.layer.get_submodule(self.family.attention[self.kind])

    def forward(self, batch: Batch) -> Tensor:
        """Block output float32 [B, S, C]; rows beyond `valid` are meaningless."""
        with products_in(self.dtype, batch.hidden):
            return self._run(batch).float()

    def _run(self, batch: Batch) -> Tensor:
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
            self.attend.apart = apply_rotary(everywhere, *rotary)
        # an item is one prefix, its answer included, where the family has any
        mask = batch.valid[:, None, None] if self.family.prefix else None
        return self.layer(batch.hidden, position_embeddings=rotary, attention_mask=mask)

    def quantize_linears(self, scheme: Scheme = DEFAULT) -> None:
        """Replace the linears by projection groups of a scheme; parameters that learn are those of `groups` and
        `heads` only."""
        if self.kind != "projector":
            attention = self.attention
            self.heads = HeadTransforms(int(attention.head_dim), scheme.kv if self.kind == "decoder" else None)
            self.attend.heads = self.heads.to(_device(self.layer))
            if self.kind == "decoder" and attention.k_proj.bias is not None:
                self.key_bias = attention.k_proj.bias.detach().view(-1, attention.head_dim).clone()
        for plan in self.plans:
            linears = [self.layer.get_submodule(part) for part in plan.parts]
            group = self._build_group(plan, linears, scheme)  # type: ignore[arg-type]
            self.groups[plan.name] = group
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
        merge = ValueMerge(self.heads, rows) if plan.value and self.heads is not None else None
        return ProjectionGroup(linears, left, right, plan.absorbs is not None, merge, scheme)

    def set_mode(self, mode: str) -> None:
        """Switch every group and the head transforms (see flatquant.MODES)."""
        for group in self.projection_groups():
            group.mode = mode
        if self.heads is not None:
            self.heads.mode = mode

    def projection_groups(self) -> list[ProjectionGroup]:
        """The groups in the order they run; empty while the block is float."""
        return list(self.groups.values())

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

    @contextmanager
    def recording(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The (query, key) [B, heads, T, D] of the attention's calls while it is open, before quantization."""
        trace: list[tuple[Tensor, Tensor]] = []
        self.attend.trace = trace
        try:
            yield trace
        finally:
            self.attend.trace = None

    def freeze(self) -> None:
        """Quantize the merged weights; mode "frozen" then runs the exported integers."""
        if self.heads is not None:
            self.heads.freeze()
        for group in self.projection_groups():
            group.freeze()

    def export(self) -> dict[str, Tensor]:
        """Checkpoint tensors of the quantized block under their full names; call `freeze` first. Every tensor on the
        CPU, floats float32."""
        out: dict[str, Tensor] = {}
        for plan in self.plans:
            for name, tensor in self.groups[plan.name].export().items():
                out[f"{self.path}.{plan.name}.{name}"] = tensor
        if self.heads is not None:
            out.update({f"{self.path}.self_attn.{name}": tensor for name, tensor in self.heads.export().items()})
        if self.key_bias is not None:  # it is added to the scores, not to the keys
            out[f"{self.path}.self_attn.k_bias"] = self.key_bias.cpu().float().clone()
            first = self.attention.config.num_attention_heads * self.attention.head_dim
            out[f"{self.path}.self_attn.qkv_proj.bias"][first : first + self.key_bias.numel()] = 0
        for name, tensor in self.layer.named_parameters():  # what is left of the float block: the norms
            if name.rpartition(".")[0] in self.family.float_norms(self.kind):
                out[f"{self.path}.{name}"] = tensor.detach().cpu().float().clone()
        for plan in self.plans:
            diag = self.groups[plan.name].diag()
            if diag is None:
                continue
            if plan.absorbs == "up":  # up's rows divided by c: its integers stay, its scales change
                beside = f"{self.path}.{plan.name.rpartition('.')[0]}.gate_up_proj"
                scale = out[f"{beside}.w_scale"]
                scale[-diag.numel() :] /= diag
                bias = out.get(f"{beside}.bias")
                if bias is not None:
                    bias[-diag.numel() :] /= diag
                continue
            for name in ("weight", "bias"):
                key = f"{self.path}.{plan.absorbs}.{name}"
                if key in out:
                    offset = self.family.norm_offset if self.kind == "decoder" else 0.0
                    out[key] = (out[key] + offset) / diag - offset
        return out


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
