"""The towers of the Qwen-VL models: where an image's patches are, and the quantized modules that the towers share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from quota.core.errors import CheckpointError
from quota.nn.embedding import axial_rotary
from quota.nn.float_attention import float_attention
from quota.nn.linear import SchemeLinear, as_dtype_of, as_float32
from quota.ops.qkv_append import apply_rotary


@dataclass(frozen=True)
class TowerGeometry:
    """Where the patches of one image are, in the tower's own order.

    order: [V] int64, raster numbers of the merged tokens in window order; inverse: back. windows: patches per window,
    in order. places: [n, 2] int64, (row, column) of every patch in window order.
    """

    order: Tensor
    inverse: Tensor
    windows: tuple[int, ...]
    places: Tensor

    @property
    def patches(self) -> int:
        return len(self.places)


@lru_cache(maxsize=64)
def geometry(rows: int, columns: int, merge: int, window: int | None) -> TowerGeometry:
    """rows, columns of the patch grid (multiples of `merge`); `window` in merged tokens; None: no windows. They run in
    raster order and are cut at the edges."""
    row, column = (
        t.flatten() for t in torch.meshgrid(torch.arange(rows // merge), torch.arange(columns // merge), indexing="ij")
    )
    number = torch.zeros_like(row)
    if window is not None:
        number = row // window * -(-(columns // merge) // window) + column // window
    order = torch.argsort(number, stable=True)
    inside = torch.stack(torch.meshgrid(torch.arange(merge), torch.arange(merge), indexing="ij"), -1).view(1, -1, 2)
    corner = torch.stack([row, column], -1)[order] * merge
    return TowerGeometry(
        order,
        torch.argsort(order),
        tuple((number.bincount() * merge**2).tolist()),
        (corner[:, None] + inside).view(-1, 2),
    )


def geometry_of(vision: Any, grid: tuple[int, int, int]) -> TowerGeometry:
    """Geometry of an image of grid (t, h, w) under a vision configuration. CheckpointError for more than one frame."""
    frames, rows, columns = grid
    if frames != 1:
        raise CheckpointError(
            f"image_grid_thw: expected single images (t = 1), got {frames} frames; videos are not supported"
        )
    window = getattr(vision, "window_size", None)
    tokens = None if window is None else window // vision.patch_size // vision.spatial_merge_size
    return geometry(rows, columns, vision.spatial_merge_size, tokens)


def tower_width(vision: Any) -> int:
    """Hidden size of the tower under a vision configuration."""
    return int(getattr(vision, "embed_dim", None) or vision.hidden_size)


def tower_rotary(where: TowerGeometry, vision: Any) -> tuple[Tensor, Tensor]:
    """cos, sin [n, D] of every patch of an image, in window order."""
    theta = (getattr(vision, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    return axial_rotary(where.places, tower_width(vision) // vision.num_heads, theta)


class QuantWindowAttention(nn.Module):
    """The tower's attention: quantized projections, float scores inside each window. Windows of one size run together;
    as a call holds one image (`OneByOne`), what they run with is a function of the image alone."""

    def __init__(self, qkv: SchemeLinear, proj: SchemeLinear, *, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = qkv, proj, heads

    @torch.no_grad()
    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> Tensor:
        """hidden_states [n, hidden] in window order, cu_seqlens [windows + 1] -> same shape."""
        n, hidden = hidden_states.shape
        q, k, v = self.qkv(hidden_states.float()).view(n, 3, self.heads, hidden // self.heads).unbind(1)
        cos, sin = (t.float()[None] for t in position_embeddings)
        q, k = (apply_rotary(t.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1) for t in (q, k))
        sizes, out = torch.diff(cu_seqlens).tolist(), torch.empty_like(v)
        for size in sorted(set(sizes)):
            first = torch.tensor(
                [int(at) for at, length in zip(cu_seqlens[:-1], sizes, strict=True) if length == size], device=v.device
            )
            rows = first[:, None] + torch.arange(size, device=v.device)  # [windows, size]
            inside_q, inside_k, inside_v = (t[rows].transpose(1, 2).contiguous() for t in (q, k, v))
            out[rows] = float_attention(inside_q, inside_k, inside_v, hidden_states.dtype).transpose(1, 2)
        return self.proj(out.reshape(n, hidden)).to(hidden_states.dtype)


class QuantMerger(nn.Sequential):
    """The merger's two linears, "0" and "2" upstream; the GELU between them is the second one's prologue."""

    def __init__(self, first: SchemeLinear, second: SchemeLinear) -> None:
        super().__init__(OrderedDict([("0", first), ("2", second)]))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, 4 vision hidden] -> [n, text hidden], same dtype."""
        first, second = self
        return as_dtype_of(second(first(as_float32(x)), "gelu"), x)


class OneByOne(nn.Module):
    """Before an upstream tower among the bases: it runs on one image at a time, so its features are the same alone and
    in any batch."""

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """hidden_states [patches of all images, patch], grid_thw [images, 3] -> as upstream."""
        parts = hidden_states.split(grid_thw.prod(-1).tolist())
        outs: list[Any] = [
            super(OneByOne, self).forward(part, grid_thw=grid[None], **kwargs)
            for part, grid in zip(parts, grid_thw, strict=True)
        ]
        return self.joined(outs)

    @staticmethod
    def joined(outs: Sequence[Any]) -> BaseModelOutputWithPooling:
        """What the tower gave for each image, as it would give it for all."""
        return BaseModelOutputWithPooling(
            last_hidden_state=torch.cat([out.last_hidden_state for out in outs]),
            pooler_output=torch.cat([out.pooler_output for out in outs]),
        )
