"""Qwen2-VL: vision transformer whose every patch attends to the whole image, plain feed-forward blocks, 2 x 2 merger,
Qwen2 decoder with M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers.models.qwen2_vl import modeling_qwen2_vl as modeling
from transformers.models.qwen2_vl import processing_qwen2_vl as upstream

from quota.models.groups import DECODER_GROUPS, Group, Groups
from quota.models.qwen_tower import OneByOne, QuantWindowAttention
from quota.models.qwen_vl import QwenProcessor, QwenVL
from quota.nn.linear import SchemeLinear
from quota.nn.mlp import QuantFeedForward

_VISION_DIMS = (
    "embed_dim",
    "mlp_ratio",
    "depth",
    "num_heads",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "hidden_size",
)


class Tower(OneByOne, modeling.Qwen2VisionTransformerPretrainedModel):
    """Upstream's, one image at a time."""


class Qwen2VLProcessor(QwenProcessor, upstream.Qwen2VLProcessor):
    """Upstream's for images and text."""


class Qwen2VL(QwenVL):
    """See the module."""

    name, title, published = "qwen2_vl", "Qwen2-VL", "Qwen2-VL-7B"
    model_class = "Qwen2VLForConditionalGeneration"
    description = "qwen2_vl: vision transformer + 2 x 2 merger + Qwen2 decoder"
    groups: ClassVar[Groups] = {
        "decoder": DECODER_GROUPS,
        "vision": (
            Group("attn.qkv", ("attn.qkv",), "norm1", "rows", fused=True),
            Group("attn.proj", ("attn.proj",), None, "columns"),
            Group("mlp.fc1", ("mlp.fc1",), "norm2"),
            Group("mlp.fc2", ("mlp.fc2",)),
        ),
        "projector": (Group("mlp.0", ("mlp.0",)), Group("mlp.2", ("mlp.2",))),
    }
    rotary_class = modeling.Qwen2VLRotaryEmbedding
    tower_class = Tower
    processor_class = Qwen2VLProcessor
    pixels = (4 * 28**2, 602_112)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dims = {"vision": [getattr(self.vision, name) for name in _VISION_DIMS]}

    @property
    def vision_mlp_size(self) -> int:
        return int(self.vision.embed_dim * self.vision.mlp_ratio)

    def tower_modules(self, linears: Mapping[str, SchemeLinear], block: Any) -> dict[str, nn.Module]:
        return {
            "attn": QuantWindowAttention(linears["attn.qkv"], linears["attn.proj"], heads=self.vision_heads),
            "mlp": QuantFeedForward(linears["mlp.fc1"], linears["mlp.fc2"], act=self.vision.hidden_act),
        }
