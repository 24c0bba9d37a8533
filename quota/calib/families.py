"""What calibration must know of each architecture: which linears form a group, what absorbs a diagonal, and how the tower's blocks run.

| block | group | reads | merged |
|---|---|---|---|
| decoder | self_attn.qkv_proj, mlp.gate_up_proj | a norm's output | diag into the norm, P_v into v rows |
| decoder | self_attn.o_proj | heads | P_v inverse into columns; online left factor mixes heads |
| decoder | mlp.down_proj | gate * up | diag into up rows (their w_scale) |
| vision (CLIP) | self_attn.qkv_proj, self_attn.out_proj, mlp.fc1 | as above, LayerNorm with bias | as above |
| vision (Qwen2.5-VL) | attn.qkv, attn.proj, mlp.gate_up_proj, mlp.down_proj | as a decoder's | as a decoder's |
| vision (CLIP), projectors | mlp.fc2, linear_1, linear_2, mlp.0, mlp.2 | a nonlinearity or features | no diag |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quota.core.errors import CheckpointError
from quota.models import ArchSpec
from quota.models.qwen2_5_vl import axial_rotary, geometry_of

Grid = tuple[int, int, int]  # frames, rows, columns of a picture's patches


@dataclass(frozen=True)
class GroupPlan:
    """One projection group. merge: name of the norm that absorbs diag; "up" = rows of the gate/up group; None = no diag. value: "rows" produces V, "columns"
    consumes the attention output. fused: the one linear already holds q, k and v."""

    name: str
    parts: tuple[str, ...]
    merge: str | None = None
    value: str | None = None
    fused: bool = False


_DECODER = (
    GroupPlan("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "rows"),
    GroupPlan("self_attn.o_proj", ("self_attn.o_proj",), None, "columns"),
    GroupPlan("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    GroupPlan("mlp.down_proj", ("mlp.down_proj",), "up"),
)
PLANS: dict[str, dict[str, tuple[GroupPlan, ...]]] = {
    "llava": {
        "decoder": _DECODER,
        "vision": (
            GroupPlan("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "layer_norm1", "rows"),
            GroupPlan("self_attn.out_proj", ("self_attn.out_proj",), None, "columns"),
            GroupPlan("mlp.fc1", ("mlp.fc1",), "layer_norm2"),
            GroupPlan("mlp.fc2", ("mlp.fc2",)),
        ),
        "projector": (GroupPlan("linear_1", ("linear_1",)), GroupPlan("linear_2", ("linear_2",))),
    },
    "qwen2_5_vl": {
        "decoder": _DECODER,
        "vision": (
            GroupPlan("attn.qkv", ("attn.qkv",), "norm1", "rows", fused=True),
            GroupPlan("attn.proj", ("attn.proj",), None, "columns"),
            GroupPlan("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "norm2"),
            GroupPlan("mlp.down_proj", ("mlp.down_proj",), "up"),
        ),
        "projector": (GroupPlan("mlp.0", ("mlp.0",)), GroupPlan("mlp.2", ("mlp.2",))),
    },
}
NORMS = frozenset({"input_layernorm", "post_attention_layernorm", "layer_norm1", "layer_norm2", "norm1", "norm2", "ln_q"})


def attention_name(family: str, kind: str) -> str:
    """Where a block's attention is."""
    return "attn" if (family, kind) == ("qwen2_5_vl", "vision") else "self_attn"


def decoder_rotary(family: str, text: Any) -> nn.Module:
    """The decoder's rotary embedding, float."""
    if family == "llava":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        return LlamaRotaryEmbedding(text)
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    return Qwen2_5_VLRotaryEmbedding(text)


def run_windows(layer: nn.Module, hidden: Tensor, valid: Tensor, grids: list[Grid], whole: bool) -> Tensor:
    """One Qwen2.5-VL tower block over right-padded pictures. hidden [B, S, C] in window order, valid [B, S] -> [B, S, C]; whole: full attention."""
    config: Any = layer.get_submodule("attn").config
    where = [geometry_of(config, grid) for grid in grids]
    segments = [size for geometry in where for size in ((geometry.patches,) if whole else geometry.windows)]
    bounds = torch.tensor([0, *segments], dtype=torch.int32, device=hidden.device).cumsum(0, dtype=torch.int32)
    rotary = [axial_rotary(geometry.places, config) for geometry in where]
    cos, sin = (torch.cat(side).to(hidden.device) for side in zip(*rotary, strict=True))
    out = torch.zeros_like(hidden)
    out[valid] = layer(hidden[valid], cu_seqlens=bounds, position_embeddings=(cos, sin))
    return out


class Tower:
    """How pictures enter and leave the tower of one architecture. source: a FloatSource."""

    def __init__(self, source: Any) -> None:
        self.source, self.arch, self.vision = source, source.arch, source.config.vision_config
        self.dynamic = self.arch.visual_tokens is None
        self._parts: dict[str, Any] = {}

    def _module(self, path: str) -> Any:
        if path not in self._parts:
            self._parts[path] = self.source.module(path)
        return self._parts[path]

    def rows(self, grid: Grid | None) -> int:
        """Rows a picture takes in the tower's stream."""
        if grid is None:
            return self.arch.visual_tokens + int(self.arch.drops_cls)
        return grid[1] * grid[2]

    def embed(self, pixels: Tensor, grid: Grid | None) -> Tensor:
        """One picture as the processor made it -> [rows, hidden], the first block's input. CheckpointError for another size than the model's."""
        if grid is not None:
            hidden = self._module(self.arch.vision_embed_path)(pixels.float())
            return hidden.view(len(hidden) // 4, 4, -1)[geometry_of(self.vision, grid).order].flatten(0, 1)
        size = self.vision.image_size
        if tuple(pixels.shape[-2:]) != (size, size):
            raise CheckpointError(f"pixel_values: expected {size} x {size} pixels, got {list(pixels.shape[-2:])}; the processor does not fit the model")
        norm = self._module(f"{self.arch.vision_path}.pre_layrnorm")
        return norm(self._module(self.arch.vision_embed_path)(pixels.float()))[0]

    def features(self, hidden: Tensor, grid: Grid | None) -> Tensor:
        """[rows, hidden] out of the tower -> what the projector reads, one row per visual token in raster order."""
        if grid is None:
            return hidden[int(self.arch.drops_cls) :]
        unit = self.vision.spatial_merge_size**2
        return hidden.view(len(hidden) // unit, -1)[geometry_of(self.vision, grid).inverse]

    def feature_size(self, rows: int, width: int) -> tuple[int, int]:
        """(rows, width) of a picture's features."""
        unit = self.vision.spatial_merge_size**2 if self.dynamic else 1
        return (rows // unit, width * unit) if self.dynamic else (rows - int(self.arch.drops_cls), width)


def decoder_positions(arch: ArchSpec, skeleton: Any, ids: Tensor, grids: list[Grid]) -> Tensor:
    """ids [S] -> rotary positions of the prompt: [S], or [S, 3] under M-RoPE."""
    if arch.visual_tokens is not None:
        return torch.arange(len(ids))
    kinds = (ids == arch.image_token_id).int()
    positions, _ = skeleton.model.get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=torch.tensor(grids) if grids else None)
    return positions[:, 0].T
