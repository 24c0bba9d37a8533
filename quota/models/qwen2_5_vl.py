"""Qwen2.5-VL: windowed vision transformer, 2 x 2 merger, Qwen2 decoder with grouped queries, q/k/v biases and M-RoPE.

An image of t x h x w patches (`image_grid_thw`, t = 1) becomes h / 2 * w / 2 visual tokens. The tower holds patches in
blocks of one merged token (the four patches of a token are neighbours in memory) and reorders tokens so that those of
one attention window are neighbours too.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from transformers.models.qwen2_5_vl import processing_qwen2_5_vl as upstream
from transformers.processing_utils import ProcessorMixin

from quota.core.errors import CheckpointError, UsageError
from quota.models.base import DECODER_GROUPS, Family, Group, Groups, Norms, Part, submodule, submodule_weight
from quota.models.images import ImageInput, PatchGrid
from quota.nn.embedding import MultimodalRotary, axial_rotary
from quota.nn.float_attention import float_attention
from quota.nn.linear import SchemeLinear, as_dtype_of, as_float32
from quota.nn.mlp import QuantMLP
from quota.ops.qkv_append import apply_rotary

_VISION_DIMS = (
    "hidden_size",
    "intermediate_size",
    "depth",
    "num_heads",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "window_size",
    "out_hidden_size",
)
_TOKEN_PX = 28  # side of a visual token of the published checkpoints
_PIXELS = (256 * _TOKEN_PX**2, 1_605_632)  # limits lmms-eval's built-in `qwen2_5_vl` gives to the processor
_FETCHED = (4 * _TOKEN_PX**2, 16_384 * _TOKEN_PX**2)  # limits of qwen-vl-utils, which resizes first
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}{%- if message['content'] is string"
    " -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{"
    " '<|vision_start|><|image_pad|><|vision_end|>' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif"
    " -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{"
    " '<|im_start|>assistant\\n' }}{%- endif -%}"
)


class Qwen25VL(Family):
    """See the module."""

    name, title, published = "qwen2_5_vl", "Qwen2.5-VL", "Qwen2.5-VL-7B"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    description = "qwen2_5_vl: windowed vision transformer + 2 x 2 merger + Qwen2 decoder"
    axes = 3
    fixed_rope = ("default",)
    max_new_tokens = 128
    attention: ClassVar[Mapping[Part, str]] = {"decoder": "self_attn", "vision": "attn"}
    groups: ClassVar[Groups] = {
        "decoder": DECODER_GROUPS,
        "vision": (
            Group("attn.qkv", ("attn.qkv",), "norm1", "rows", fused=True),
            Group("attn.proj", ("attn.proj",), None, "columns"),
            Group("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "norm2"),
            Group("mlp.down_proj", ("mlp.down_proj",), "up"),
        ),
        "projector": (Group("mlp.0", ("mlp.0",)), Group("mlp.2", ("mlp.2",))),
    }
    norms: ClassVar[Norms] = {
        "decoder": frozenset({"input_layernorm", "post_attention_layernorm"}),
        "vision": frozenset({"norm1", "norm2"}),
        "projector": frozenset({"ln_q"}),
    }
    # Published checkpoints: `visual.*`, `model.layers.*`, `lm_head.*`; saved by transformers 5 also `model.visual.*`,
    # `model.language_model.*`.
    key_rules = (
        (re.compile(r"^visual\."), "model.visual."),
        (re.compile(r"^language_model\."), "model.language_model."),
        (re.compile(r"^model\.(?!language_model\.|visual\.)"), "model.language_model."),
    )
    vision_path = "model.visual"
    vision_embed_path = "model.visual.patch_embed"
    encoder_path = "model.visual.blocks"
    projector_path = "model.visual.merger"
    visual_tokens = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        vision = self.vision
        if getattr(self.text, "use_sliding_window", False):
            raise CheckpointError(
                "use_sliding_window: expected false, got true; sliding-window attention is not supported"
            )
        self.vision_layers_used = self.vision_layers_total = vision.depth
        self.vision_hidden_size, self.vision_heads, self.merge = (
            vision.hidden_size,
            vision.num_heads,
            vision.spatial_merge_size,
        )
        self.image_token_id = int(config.image_token_id)
        self.patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.dims = {
            "vision": [getattr(vision, name) for name in _VISION_DIMS],
            "full_attention": sorted(vision.fullatt_block_indexes),
        }

    # quantized modules

    def tower_modules(self, linears: Mapping[str, SchemeLinear]) -> dict[str, nn.Module]:
        return {
            "attn": QuantWindowAttention(linears["attn.qkv"], linears["attn.proj"], heads=self.vision_heads),
            "mlp": QuantMLP(linears["mlp.gate_up_proj"], linears["mlp.down_proj"], act=self.vision.hidden_act),
        }

    def projector_modules(self, linears: Mapping[str, SchemeLinear]) -> dict[str, nn.Module]:
        return {"mlp": QuantMerger(linears["mlp.0"], linears["mlp.2"])}

    def finish_tower(self, tower: Any) -> None:
        tower.__class__ = ImageByImage  # same fields; only the order of work changes

    def rotary(self, device: Any) -> nn.Module:
        return MultimodalRotary(modeling.Qwen2_5_VLRotaryEmbedding(config=self.text), device=device)

    def float_rotary(self) -> nn.Module:
        return modeling.Qwen2_5_VLRotaryEmbedding(self.text)

    def fill_derived(self, model: Any) -> None:
        super().fill_derived(model)
        tower: Any = submodule(model, self.vision_path)
        tower.rotary_pos_emb = type(tower.rotary_pos_emb)(tower.config)

    # images and positions

    @classmethod
    def open_processor(cls, folder: str | Path, **options: Any) -> Any:
        return Qwen2_5_VLProcessor.from_pretrained(str(folder), **options)

    def image_tokens(self, image: ImageInput) -> int:
        if image.grid is None:
            raise UsageError(
                f"image: expected patches and their grid (1, h, w), got pixels {list(image.pixels.shape)} alone"
            )
        frames, rows, columns = image.grid
        if frames != 1 or min(rows, columns) < 1 or rows % self.merge or columns % self.merge:
            raise UsageError(
                f"image: expected a grid (1, h, w) of multiples of {self.merge}, got {image.grid}; videos are not"
                " supported"
            )
        if tuple(image.pixels.shape) != (rows * columns, self.patch):
            raise UsageError(
                f"image: expected pixels {[rows * columns, self.patch]} for grid {image.grid}, got"
                f" {list(image.pixels.shape)}"
            )
        return rows * columns // self.merge**2

    def encode(self, model: Any, images: Sequence[ImageInput]) -> list[Tensor]:
        weight = submodule_weight(model, self.embed_path)
        features = []
        for image in images:  # a float tower's sums may depend on what else is in a call
            grid = torch.tensor([image.grid], device=weight.device)
            found = model.model.get_image_features(
                pixel_values=image.pixels.to(weight), image_grid_thw=grid, return_dict=True
            )
            features.append(found.pooler_output[0].to(weight.dtype).clone())
        return features

    def image_index(self, ids: Tensor) -> Tensor:
        visual = ids == self.image_token_id  # markers stand between images, so a run is an image
        begins = visual & ~torch.cat([torch.zeros_like(visual[:, :1]), visual[:, :-1]], -1)
        return (begins.long().cumsum(-1) - 1).masked_fill(~visual, -1)

    def positions(self, model: Any, ids: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        kinds = (ids == self.image_token_id).int()[None]
        where = torch.tensor([list(grid) for grid in grids]) if grids else None
        found = model.model.get_rope_index(input_ids=ids[None], mm_token_type_ids=kinds, image_grid_thw=where)[0]
        return found[:, 0].long()

    def rotary_axes(self, rotary: Any) -> list[tuple[int, int, int]]:
        sections, half, spans, end = rotary.inner.mrope_section, self.head_dim // 2, [], 0
        for axis, size in enumerate(sections):
            spans.append((end, end + size, axis % 3))
            end += size
        return [*spans, *((half + first, half + last, axis) for first, last, axis in spans)]

    # the tower block by block

    def tower_rows(self, grid: PatchGrid | None) -> int:
        assert grid is not None
        return grid[1] * grid[2]

    def tower_input(self, module: Callable[[str], Any], image: ImageInput) -> Tensor:
        assert image.grid is not None
        hidden, unit = module(self.vision_embed_path)(image.pixels.float()), self.merge**2
        return hidden.view(len(hidden) // unit, unit, -1)[geometry_of(self.vision, image.grid).order].flatten(0, 1)

    def tower_block(
        self, layer: nn.Module, index: int, hidden: Tensor, valid: Tensor, grids: Sequence[PatchGrid] | None
    ) -> Tensor:
        assert grids is not None
        where = [geometry_of(self.vision, grid) for grid in grids]
        whole = index in self.vision.fullatt_block_indexes
        segments = [size for geometry in where for size in ((geometry.patches,) if whole else geometry.windows)]
        bounds = torch.tensor([0, *segments], dtype=torch.int32, device=hidden.device).cumsum(0, dtype=torch.int32)
        rotary = [tower_rotary(geometry, self.vision) for geometry in where]
        cos, sin = (torch.cat(side).to(hidden.device) for side in zip(*rotary, strict=True))
        out = torch.zeros_like(hidden)
        out[valid] = layer(hidden[valid], cu_seqlens=bounds, position_embeddings=(cos, sin))
        return out

    def projector_rows(self, hidden: Tensor, grid: PatchGrid | None) -> Tensor:
        assert grid is not None
        return hidden.view(len(hidden) // self.merge**2, -1)[geometry_of(self.vision, grid).inverse]

    def projector_block(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        # the merger normalises single patches and flattens the batch
        flat = layer(hidden.reshape(-1, self.vision.hidden_size))
        return flat.view(*hidden.shape[:2], -1)

    # words and costs

    def evaluation_pixels(self, processor: Any, limits: tuple[int | None, int | None]) -> Callable[[Any], Any] | None:
        # other token sizes are not what the built-in wrapper is written for
        published = self.vision.patch_size * self.merge == _TOKEN_PX
        size = processor.image_processor.size
        usual = _PIXELS if published else (size["shortest_edge"], size["longest_edge"])
        fewest, most = (given or own for given, own in zip(limits, usual, strict=True))
        if fewest > most:
            raise UsageError(f"min_pixels: expected at most max_pixels ({most}), got {fewest}")
        processor.image_processor.size = {"shortest_edge": fewest, "longest_edge": most}
        return _fetched if published else None

    def vision_macs(self, visual_tokens: int) -> int:
        v, unit = self.vision, self.merge**2
        n, h = visual_tokens * unit, v.hidden_size
        full, window = len(v.fullatt_block_indexes), (v.window_size // v.patch_size) ** 2
        linears = n * (4 * h * h + 3 * h * v.intermediate_size) * v.depth
        attention = 2 * h * n * (full * n + (v.depth - full) * min(n, window))
        merger = visual_tokens * unit * h * (unit * h + v.out_hidden_size)
        return n * self.patch * h + linears + attention + merger

    def pixel_shape(self, visual_tokens: int) -> tuple[tuple[int, ...], PatchGrid | None]:
        side = self.merge * math.isqrt(visual_tokens)
        return (side * side, self.patch), (1, side, side)


def _fetched(image: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    width, height = image.size
    rows, columns = smart_resize(height, width, factor=_TOKEN_PX, min_pixels=_FETCHED[0], max_pixels=_FETCHED[1])
    return image.resize((columns, rows))


class Qwen2_5_VLProcessor(upstream.Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor for images and text, which needs no torchvision; its files name upstream's class, so it
    has that name.

    Videos are refused by the base class, which finds no video processor.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = (
            tokenizer.convert_tokens_to_ids(token) for token in (self.image_token, self.video_token)
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template or _CHAT_TEMPLATE)

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes. Upstream's class wants a video processor where torchvision is installed; it
        has the images' sizes, as upstream's own fallback gives it."""
        out: dict[str, Any] = super().to_dict()
        videos = {name: value for name, value in out["image_processor"].items() if name != "image_processor_type"}
        out["video_processor"] = {**videos, "video_processor_type": "Qwen2VLVideoProcessor"}
        return out


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
def geometry(rows: int, columns: int, merge: int, window: int) -> TowerGeometry:
    """rows, columns of the patch grid (multiples of `merge`); `window` in merged tokens. Windows run in raster order
    and are cut at the edges."""
    row, column = (
        t.flatten() for t in torch.meshgrid(torch.arange(rows // merge), torch.arange(columns // merge), indexing="ij")
    )
    across = -(-(columns // merge) // window)
    number = row // window * across + column // window
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
    return geometry(
        rows, columns, vision.spatial_merge_size, vision.window_size // vision.patch_size // vision.spatial_merge_size
    )


def tower_rotary(where: TowerGeometry, vision: Any) -> tuple[Tensor, Tensor]:
    """cos, sin [n, D] of every patch of an image, in window order."""
    theta = (getattr(vision, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    return axial_rotary(where.places, vision.hidden_size // vision.num_heads, theta)


class QuantWindowAttention(nn.Module):
    """The tower's attention: quantized projections, float scores inside each window. Windows of one size run together;
    as a call holds one image (`ImageByImage`), what they run with is a function of the image alone."""

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


class ImageByImage(modeling.Qwen2_5_VisionTransformerPretrainedModel):
    """The upstream tower, run on one image at a time: its features are the same alone and in any batch."""

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """hidden_states [patches of all images, patch], grid_thw [images, 3] -> as upstream."""
        parts = hidden_states.split(grid_thw.prod(-1).tolist())
        outs: list[Any] = [
            super(ImageByImage, self).forward(part, grid_thw=grid[None], **kwargs)
            for part, grid in zip(parts, grid_thw, strict=True)
        ]
        return BaseModelOutputWithPooling(
            last_hidden_state=torch.cat([out.last_hidden_state for out in outs]),
            pooler_output=torch.cat([out.pooler_output for out in outs]),
        )
