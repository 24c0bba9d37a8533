"""LLaVA-OneVision: SigLIP vision tower over the tiles of an image, two-layer projector, Qwen2 decoder. A grid of many
tiles shrinks to a limit of tokens; an image among several has one tile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers.models.llava_onevision import processing_llava_onevision as upstream

from quota.core.errors import CheckpointError
from quota.models.anyres import AnyRes
from quota.models.llava_siglip import LlavaSiglip
from quota.models.processing import WithoutVideos

_LIMIT = "anyres_max_"


class LlavaOnevisionProcessor(WithoutVideos, upstream.LlavaOnevisionProcessor):
    """Upstream's for images and text. Images come in order over all prompts, and a prompt with several has them whole,
    in a tile each, as the model was trained."""

    video_type = "LlavaOnevisionVideoProcessor"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        vision_aspect_ratio: str = "anyres_max_9",
        **kwargs: Any,
    ) -> None:
        upstream.LlavaOnevisionProcessor.__init__(
            self,
            image_processor,
            tokenizer,
            None,
            num_image_tokens,
            vision_feature_select_strategy,
            chat_template,
            vision_aspect_ratio=vision_aspect_ratio,
        )

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        if images and text is not None and not isinstance(images[0], (list, tuple)):
            left, prompts = list(images), [text] if isinstance(text, str) else list(text)
            counts = [prompt.count(self.image_token) for prompt in prompts]
            if sum(counts) == len(left):  # else upstream says what is missing
                images = [[left.pop(0) for _ in range(count)] for count in counts if count]
        return super().__call__(images=images, text=text, **kwargs)


class LlavaOnevision(AnyRes, LlavaSiglip):
    """See the module."""

    name, title, published = "llava_onevision", "LLaVA-OneVision", "LLaVA-OneVision-7B"
    model_class = "LlavaOnevisionForConditionalGeneration"
    description = "llava_onevision: SigLIP vision tower over tiles + two-layer projector + Qwen2 decoder"
    decoders: ClassVar[Mapping[str, type[nn.Module]]] = {"qwen2": LlavaSiglip.decoders["qwen2"]}
    processor_class = LlavaOnevisionProcessor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        most = str(config.vision_aspect_ratio).removeprefix(_LIMIT)
        if not most.isdecimal() or not 0 < int(most) < 1024:
            raise CheckpointError(
                f"vision_aspect_ratio: expected {_LIMIT}N with N from 1 to 1023, got {config.vision_aspect_ratio!r}"
            )
        self.most = int(most)
        self.dims |= {"most": self.most}
