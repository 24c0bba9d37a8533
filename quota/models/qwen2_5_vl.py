"""Qwen2.5-VL layout: windowed vision transformer, 2 x 2 merger, Qwen2 decoder with grouped queries, q/k/v biases and M-RoPE.

A picture of t x h x w patches (`image_grid_thw`, t = 1) becomes h / 2 * w / 2 visual tokens. The tower holds patches in blocks of one merged token
(the four patches of a token are neighbours in memory) and reorders tokens so that those of one attention window are neighbours too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quota.core.errors import CheckpointError
from quota.models.base import ArchSpec, text_sizes

DESCRIPTION = "qwen2_5_vl: windowed vision transformer + 2 x 2 merger + Qwen2 decoder"
_VISION_DIMS = (
    "hidden_size", "intermediate_size", "depth", "num_heads", "patch_size", "temporal_patch_size", "spatial_merge_size", "window_size", "out_hidden_size",
)  # fmt: skip

# Published checkpoints: `visual.*`, `model.layers.*`, `lm_head.*`; saved by transformers 5 also `model.visual.*`, `model.language_model.*`.
_KEY_RULES = (
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^language_model\."), "model.language_model."),
    (re.compile(r"^model\.(?!language_model\.|visual\.)"), "model.language_model."),
)


def describe(config: Any) -> ArchSpec:
    """The layout of a Qwen2.5-VL configuration; CheckpointError for variants nothing here was made for."""
    text, vision = config.text_config, config.vision_config
    if getattr(text, "use_sliding_window", False):
        raise CheckpointError("use_sliding_window: expected false, got true; sliding-window attention is not supported")
    dims = {"vision": [getattr(vision, name) for name in _VISION_DIMS], "full_attention": sorted(vision.fullatt_block_indexes)}
    return ArchSpec(
        name="qwen2_5_vl", model_class="Qwen2_5_VLForConditionalGeneration", vision_layers_used=vision.depth, vision_layers_total=vision.depth,
        vision_hidden_size=vision.hidden_size, vision_intermediate_size=vision.intermediate_size, vision_heads=vision.num_heads,
        image_token_id=int(config.image_token_id), visual_tokens=None, merge=vision.spatial_merge_size, multimodal_positions=True, dims=dims,
        key_rules=_KEY_RULES,
        vision_path="model.visual", vision_embed_path="model.visual.patch_embed", encoder_path="model.visual.blocks",
        projector_path="model.visual.merger", **text_sizes(text),
    )  # fmt: skip


@dataclass(frozen=True)
class TowerGeometry:
    """Where the patches of one picture are, in the tower's own order.

    order: [V] int64, raster numbers of the merged tokens in window order; inverse: back. windows: patches per window, in order. places: [n, 2] int64,
    (row, column) of every patch in window order.
    """

    order: Tensor
    inverse: Tensor
    windows: tuple[int, ...]
    places: Tensor

    @property
    def patches(self) -> int:
        return len(self.places)


@lru_cache(maxsize=64)
def geometry(rows: int, columns: int, merge: int, window: int) -> TowerGeometry:
    """rows, columns of the patch grid (multiples of `merge`); `window` in merged tokens. Windows run in raster order and are cut at the edges."""
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(rows // merge), torch.arange(columns // merge), indexing="ij"))
    across = -(-(columns // merge) // window)
    number = row // window * across + column // window
    order = torch.argsort(number, stable=True)
    inside = torch.stack(torch.meshgrid(torch.arange(merge), torch.arange(merge), indexing="ij"), -1).view(1, -1, 2)
    corner = torch.stack([row, column], -1)[order] * merge
    return TowerGeometry(order, torch.argsort(order), tuple((number.bincount() * merge**2).tolist()), (corner[:, None] + inside).view(-1, 2))


def geometry_of(vision: Any, grid: tuple[int, int, int]) -> TowerGeometry:
    """Geometry of a picture of grid (t, h, w) under a vision configuration. CheckpointError for more than one frame."""
    frames, rows, columns = grid
    if frames != 1:
        raise CheckpointError(f"image_grid_thw: expected single pictures (t = 1), got {frames} frames; videos are not supported")
    return geometry(rows, columns, vision.spatial_merge_size, vision.window_size // vision.patch_size // vision.spatial_merge_size)


def axial_rotary(places: Tensor, vision: Any) -> tuple[Tensor, Tensor]:
    """places [n, 2] -> cos, sin [n, D] float32 of the tower's rotary embedding, rounded once from float64.

    Rows turn the first quarter of the channels, columns the second, and both again in the upper half.
    """
    dim = vision.hidden_size // vision.num_heads
    theta = (getattr(vision, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    frequency = 1.0 / (theta ** (torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2)))
    angles = (places[..., None].float() * frequency).flatten(-2).double()
    cos, sin = (torch.cat([part, part], -1).float() for part in (angles.cos(), angles.sin()))
    return cos, sin


def vision_macs(config: Any, visual_tokens: int) -> int:
    """Multiply-accumulates of tower and merger for a picture of `visual_tokens`: patch embedding, windowed and full blocks, two merger layers."""
    v = config.vision_config
    n, h, unit = visual_tokens * v.spatial_merge_size**2, v.hidden_size, v.spatial_merge_size**2
    full, window = len(v.fullatt_block_indexes), (v.window_size // v.patch_size) ** 2
    linears = n * (4 * h * h + 3 * h * v.intermediate_size) * v.depth
    attention = 2 * h * n * (full * n + (v.depth - full) * min(n, window))
    merger = visual_tokens * unit * h * (unit * h + v.out_hidden_size)
    return n * v.in_channels * v.temporal_patch_size * v.patch_size**2 * h + linears + attention + merger
