"""LLaVA-NeXT (LLaVA-1.6): CLIP vision tower over the tiles of an image, two-layer projector, LLaMA, Mistral or Qwen2
decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from quota.models.anyres import AnyRes
from quota.models.llava import Llava


class LlavaNext(AnyRes):
    """See the module."""

    name, title, published = "llava_next", "LLaVA-NeXT", "LLaVA-1.6-Mistral-7B"
    model_class = "LlavaNextForConditionalGeneration"
    description = "llava_next: CLIP vision tower over tiles + two-layer projector + LLaMA, Mistral or Qwen2 decoder"
    decoders: ClassVar[Mapping[str, type[nn.Module]]] = {**Llava.decoders, "mistral": MistralRotaryEmbedding}
