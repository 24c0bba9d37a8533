"""Opening processors with one image backend (PIL), whatever is installed beside it: pixels must not depend on torchvision being there.

Upstream's Qwen2.5-VL processor cannot be built without torchvision, because a video processor is a mandatory part of it. Pictures need none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin

BACKEND = "pil"
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


class ImageProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor for pictures and text. Videos are refused by the base class, which finds no video processor."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = (tokenizer.convert_tokens_to_ids(token) for token in (self.image_token, self.video_token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template or _CHAT_TEMPLATE)


def open_processor(checkpoint: str | Path) -> Any:
    """The processor of a folder or hub name, left padding, PIL pictures. Raises what transformers raises (OSError, ValueError, ...)."""
    from transformers import AutoConfig

    kind = getattr(AutoConfig.from_pretrained(str(checkpoint)), "model_type", "")
    if kind != "qwen2_5_vl":
        processor = AutoProcessor.from_pretrained(str(checkpoint), backend=BACKEND)
    else:
        processor = ImageProcessor.from_pretrained(str(checkpoint), backend=BACKEND)
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer.padding_side = "left"
    return processor


def image_backend(processor: Any) -> str:
    """ "pil" or "torchvision": what turns pictures into pixels; for result files, because the two differ in the last bits."""
    return "pil" if type(getattr(processor, "image_processor", None)).__name__.endswith("Pil") else "torchvision"
