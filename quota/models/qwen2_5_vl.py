"""Qwen2.5-VL: windowed vision transformer, 2 x 2 merger, Qwen2 decoder with grouped queries, q/k/v biases and M-RoPE.

The tower reorders tokens so that those of one attention window are neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from transformers.models.qwen2_5_vl import processing_qwen2_5_vl as upstream

from quota.models.groups import DECODER_GROUPS, Group, Groups
from quota.models.qwen_tower import OneByOne, QuantWindowAttention, TowerGeometry
from quota.models.qwen_vl import QwenProcessor, QwenVL
from quota.nn.linear import SchemeLinear
from quota.nn.mlp import QuantMLP

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


class Tower(OneByOne, modeling.Qwen2_5_VisionTransformerPretrainedModel):
    """Upstream's, one image at a time."""


class Qwen2_5_VLProcessor(QwenProcessor, upstream.Qwen2_5_VLProcessor):
    """Upstream's for images and text."""


class Qwen25VL(QwenVL):
    """See the module."""

    name, title, published = "qwen2_5_vl", "Qwen2.5-VL", "Qwen2.5-VL-7B"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    description = "qwen2_5_vl: windowed vision transformer + 2 x 2 merger + Qwen2 decoder"
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
    mlp_linears = 3
    rotary_class = modeling.Qwen2_5_VLRotaryEmbedding
    tower_class = Tower
    processor_class = Qwen2_5_VLProcessor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dims = {
            "vision": [getattr(self.vision, name) for name in _VISION_DIMS],
            "full_attention": sorted(self.vision.fullatt_block_indexes),
        }

    def tower_modules(self, linears: Mapping[str, SchemeLinear], block: Any) -> dict[str, nn.Module]:
        return {
            "attn": QuantWindowAttention(linears["attn.qkv"], linears["attn.proj"], heads=self.vision_heads),
            "mlp": QuantMLP(linears["mlp.gate_up_proj"], linears["mlp.down_proj"], act=self.vision.hidden_act),
        }

    def segments(self, index: int, where: TowerGeometry) -> tuple[int, ...]:
        return super().segments(index, where) if index in self.vision.fullatt_block_indexes else where.windows

    def attended(self, index: int, patches: int) -> int:
        window: int = (self.vision.window_size // self.vision.patch_size) ** 2
        return patches if index in self.vision.fullatt_block_indexes else min(patches, window)
