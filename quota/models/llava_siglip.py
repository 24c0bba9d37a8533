"""LLaVA with a SigLIP tower: no class token, so every patch becomes a visual token, and no norm before the first block.

The tower's last norm and its pooling head stand behind the features; a quantized tower leaves the head out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from quota.core.errors import CheckpointError
from quota.models.images import ImageInfo, ImageInput, image_digest
from quota.models.llava import Llava
from quota.nn.embedding import PatchEmbedding


class LlavaSiglip(Llava):
    """See the module."""

    title, published = "LLaVA with SigLIP", "none"
    description = "llava: SigLIP vision tower + two-layer projector + LLaMA or Qwen2 decoder"
    tower = "siglip_vision_model"
    class_tokens = 0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.drops_cls:
            raise CheckpointError(
                "vision_feature_select_strategy: expected full, got default; a SigLIP tower has no class token to drop"
            )
        self.dims["tower"] = self.tower

    def shown(self, image: ImageInput) -> list[ImageInfo]:
        """The whole image: its processor resizes and cuts nothing off."""
        side = self.tile_px // self.vision.patch_size
        return [ImageInfo(image_digest(image.pixels), (side, side))]

    def finish_tower(self, tower: Any) -> None:
        for layer in tower.encoder.layers[self.vision_layers_used :]:
            layer.__class__ = UnusedSiglipLayer
        tower.use_head = False
        tower.embeddings.patch_embedding = PatchEmbedding.replacing(tower.embeddings.patch_embedding)

    def enter_tower(self, module: Callable[[str], Any], embedded: Tensor) -> Tensor:
        return embedded


class UnusedSiglipLayer(SiglipEncoderLayer):
    """A layer above the one LLaVA takes its features from: same fields and state, not computed."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states, as they came."""
        return hidden_states
