"""PaliGemma: SigLIP tower with its last norm, a projector of one linear layer, Gemma decoder: word embeddings scaled by
the root of the width, norms that multiply by 1 + weight, a gated MLP with the tanh form of GELU.

The tokens of a prompt see the whole prompt, images and words alike; only the answer is causal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding
from transformers.processing_utils import ProcessorMixin

from quota.core.errors import CheckpointError
from quota.models.base import Family, submodule
from quota.models.groups import Group, Groups
from quota.models.llava_siglip import LlavaSiglip
from quota.nn.linear import SchemeLinear, as_dtype_of, as_float32, without_grad

_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- if message['content'] is not string -%}{%- for part in message['content'] |"
    " selectattr('type', 'equalto', 'image') -%}<image>{%- endfor -%}{%- endif -%}{%- endfor -%}{{ bos_token }}{%- for"
    " message in messages -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in"
    " message['content'] | selectattr('type', 'equalto', 'text') -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}{{"
    " '\\n' }}{%- endfor -%}"
)


class PaliGemma(LlavaSiglip):
    """See the module."""

    name, title, published = "paligemma", "PaliGemma", "PaliGemma-3B"
    model_class = "PaliGemmaForConditionalGeneration"
    description = "paligemma: SigLIP vision tower + one linear layer + Gemma decoder"
    decoders: ClassVar[Mapping[str, type[nn.Module]]] = {"gemma": GemmaRotaryEmbedding}
    groups: ClassVar[Groups] = {**LlavaSiglip.groups, "projector": (Group("linear", ("linear",)),)}
    prefix, norm_offset, first_position = True, 1.0, 1

    @classmethod
    def kind_of(cls, config: Any) -> type[Family]:
        return cls

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = self.text
        for name, expected in (("attention_bias", False), ("use_bidirectional_attention", True)):
            if getattr(text, name, expected) is not expected:
                raise CheckpointError(
                    f"text_config.{name}: expected {str(expected).lower()}, got {getattr(text, name)}"
                )
        if self.vision.projection_dim != self.hidden_size:
            raise CheckpointError(
                f"projection_dim: expected the decoder's width {self.hidden_size}, got {self.vision.projection_dim}"
            )
        if self.image_token_id >= text.vocab_size:
            raise CheckpointError(
                f"image_token_index: expected one of {text.vocab_size} words, got {self.image_token_id}"
            )
        self.embed_scale = self.hidden_size**0.5

    def projector_modules(self, linears: Mapping[str, SchemeLinear]) -> dict[str, nn.Module]:
        return {"": LinearProjector(linears["linear"])}

    def fill_derived(self, model: Any) -> None:
        super().fill_derived(model)
        words: Any = submodule(model, self.embed_path)
        words.register_buffer("embed_scale", torch.tensor(words.scalar_embed_scale), persistent=False)

    @classmethod
    def open_processor(cls, folder: str | Path, **options: Any) -> Any:
        return PaliGemmaProcessor.from_pretrained(str(folder), **options)

    def leave_tower(self, module: Callable[[str], Any], hidden: Tensor) -> Tensor:
        out: Tensor = module(f"{self.vision_path}.post_layernorm")(hidden)
        return out

    def vision_macs(self, visual_tokens: int) -> int:
        return super().vision_macs(visual_tokens) - self.patches * self.hidden_size**2  # one layer, not two


class LinearProjector(nn.Module):
    """Vision features to the language model's width."""

    def __init__(self, linear: SchemeLinear) -> None:
        super().__init__()
        self.linear = linear

    @without_grad
    def forward(self, image_features: Tensor) -> Tensor:
        """image_features [..., vision hidden] -> [..., text hidden], same dtype."""
        return as_dtype_of(self.linear(as_float32(image_features)), image_features)


class PaliGemmaProcessor(ProcessorMixin):
    """Images and text for PaliGemma: the images of all turns, the begin token, the words, a line's end. Files name
    upstream's class, so this one has its name; that one wants an image in every prompt."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.image_seq_length = image_processor.image_seq_length
        tokenizer.add_bos_token = tokenizer.add_eos_token = False
        super().__init__(image_processor, tokenizer, chat_template=chat_template or _CHAT_TEMPLATE)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As of upstream's processors, with token_type_ids: 0, all of it is prompt."""
        out: Any = super().__call__(images=images, text=text, **kwargs)
        ids = out["input_ids"]
        out["token_type_ids"] = torch.zeros_like(ids) if isinstance(ids, Tensor) else [[0] * len(row) for row in ids]
        return out

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text of one image."""
        return self.image_token * self.image_seq_length
