"""Qwen3-VL, dense: vision transformer with an interpolated table of positions, 2 x 2 mergers, Qwen3 decoder with norms
of each query and key head and interleaved M-RoPE.

DeepStack: the outputs of some tower blocks have mergers of their own; what these give, the planes, is added to the
visual tokens after the first decoder layers, one plane a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling
from transformers.models.qwen3_vl import processing_qwen3_vl as upstream
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from quota.core.errors import CheckpointError
from quota.models.groups import DECODER_GROUPS, Group, Groups, Norms
from quota.models.images import ImageInput
from quota.models.qwen_tower import OneByOne, QuantWindowAttention
from quota.models.qwen_vl import QwenProcessor, QwenVL
from quota.nn.linear import SchemeLinear, as_dtype_of, as_float32
from quota.nn.mlp import QuantFeedForward

_VISION_DIMS = (
    "hidden_size",
    "intermediate_size",
    "depth",
    "num_heads",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "num_position_embeddings",
    "out_hidden_size",
)


class Tower(OneByOne, modeling.Qwen3VLVisionModel):
    """Upstream's, one image at a time."""

    @staticmethod
    def joined(outs: Sequence[Any]) -> Any:
        whole = OneByOne.joined(outs)
        planes = [torch.cat(parts) for parts in zip(*(out.deepstack_features for out in outs), strict=True)]
        return modeling.BaseModelOutputWithDeepstackFeatures(**whole, deepstack_features=planes)


class Merger(modeling.Qwen3VLVisionPatchMerger):
    """Upstream's over quantized linears; the GELU between them is the second one's prologue."""

    def forward(self, x: Tensor) -> Tensor:
        """x [n, vision hidden] -> [n / 4, text hidden], same dtype."""
        rows = self.norm(x.view(-1, self.hidden_size) if self.use_postshuffle_norm else x).view(-1, self.hidden_size)
        return as_dtype_of(self.linear_fc2(self.linear_fc1(as_float32(rows)), "gelu"), x)


class Qwen3VLProcessor(QwenProcessor, upstream.Qwen3VLProcessor):
    """Upstream's for images and text."""


class Qwen3VL(QwenVL):
    """See the module."""

    name, title, published = "qwen3_vl", "Qwen3-VL", "Qwen3-VL-8B"
    hub_rules = ()  # published checkpoints have the names inside the model
    model_class = "Qwen3VLForConditionalGeneration"
    description = "qwen3_vl: vision transformer + 2 x 2 mergers (DeepStack) + dense Qwen3 decoder"
    groups: ClassVar[Groups] = {
        "decoder": DECODER_GROUPS,
        "vision": (
            Group("attn.qkv", ("attn.qkv",), "norm1", "rows", fused=True),
            Group("attn.proj", ("attn.proj",), None, "columns"),
            Group("mlp.fc1", ("mlp.linear_fc1",), "norm2"),
            Group("mlp.fc2", ("mlp.linear_fc2",)),
        ),
        "projector": (Group("linear_fc1", ("linear_fc1",)), Group("linear_fc2", ("linear_fc2",))),
    }
    norms: ClassVar[Norms] = {**QwenVL.norms, "projector": frozenset({"norm"})}
    rotary_class = modeling.Qwen3VLTextRotaryEmbedding
    tower_class = Tower
    processor_class = Qwen3VLProcessor
    token_px = 32

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        taps = list(self.vision.deepstack_visual_indexes)
        inside = all(0 <= tap < self.vision.depth for tap in taps)
        if not inside or taps != sorted(set(taps)) or len(taps) >= self.layers:
            raise CheckpointError(
                f"vision_config.deepstack_visual_indexes: expected fewer than {self.layers} ascending blocks of"
                f" {self.vision.depth}, got {taps}"
            )
        self.taps = tuple(taps)
        self.dims = {"vision": [getattr(self.vision, name) for name in _VISION_DIMS], "deepstack": taps}

    @property
    def projector_paths(self) -> list[str]:
        own = [f"model.visual.deepstack_merger_list.{number}" for number in range(len(self.taps))]
        return [self.projector_path, *own]

    # quantized modules

    def tower_modules(self, linears: Mapping[str, SchemeLinear], block: Any) -> dict[str, nn.Module]:
        return {
            "attn": QuantWindowAttention(linears["attn.qkv"], linears["attn.proj"], heads=self.vision_heads),
            "mlp": QuantFeedForward(linears["mlp.fc1"], linears["mlp.fc2"], act=self.vision.hidden_act),
        }

    def projector_modules(self, linears: Mapping[str, SchemeLinear]) -> dict[str, nn.Module]:
        return dict(linears)

    def finish_projector(self, projector: Any) -> None:
        projector.__class__ = Merger  # same fields

    # images and positions

    def features_of(self, found: Any) -> Tensor:
        return torch.cat([found.pooler_output[0], *(plane[0] for plane in found.deepstack_features)], -1)

    def take_planes(self, arguments: dict[str, Any]) -> Tensor | None:
        visual, planes = arguments.pop("visual_pos_masks", None), arguments.pop("deepstack_visual_embeds", None)
        if not planes:
            return None
        flat = torch.cat(list(planes), -1)
        out = flat.new_zeros(*visual.shape, flat.shape[-1])
        out[visual] = flat
        return out

    def channel_axes(self, sections: Sequence[int]) -> list[int]:
        """Rows and columns turn every third pair, as far as they have any; time the rest."""
        pairs = self.head_dim // 2
        axes = [0] * pairs
        for axis in (1, 2):
            for pair in range(axis, min(3 * sections[axis], pairs), 3):
                axes[pair] = axis
        return axes

    # the tower block by block

    def tower_input(self, module: Callable[[str], Any], image: ImageInput) -> Tensor:
        hidden = super().tower_input(module, image)
        table: Any = module(f"{self.vision_path}.pos_embed")
        at, weights = get_vision_interpolation_indices_and_weights(
            torch.tensor([image.grid]),
            num_grid_per_side=int(self.vision.num_position_embeddings**0.5),
            mode="bilinear",
            align_corners=True,
            spatial_merge_size=self.merge,
        )
        return hidden + (table(at) * weights[:, :, None]).sum(1)

    # costs

    def vision_macs(self, visual_tokens: int) -> int:
        unit, h = self.merge**2, self.vision_hidden_size
        merger = visual_tokens * unit * h * (unit * h + self.hidden_size)
        return super().vision_macs(visual_tokens) + len(self.taps) * merger
