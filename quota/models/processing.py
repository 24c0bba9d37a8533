"""Opening processors with one image backend (PIL), whatever is installed beside it: pixels must not depend on torchvision being there.

Upstream's Qwen2.5-VL processor cannot be built without torchvision, because a video processor is a mandatory part of it. Pictures need none.
Files that a processor writes name its class, and others open them by that name: the class here has upstream's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor
from transformers.models.qwen2_5_vl import processing_qwen2_5_vl as upstream
from transformers.processing_utils import ProcessorMixin

from quota.core.documents import read_object
from quota.models.config import refuse_folder_code

BACKEND = "pil"
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


class Qwen2_5_VLProcessor(upstream.Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor for pictures and text. Videos are refused by the base class, which finds no video processor."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = (tokenizer.convert_tokens_to_ids(token) for token in (self.image_token, self.video_token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template or _CHAT_TEMPLATE)


def open_processor(folder: str | Path) -> Any:
    """The processor of a checkpoint folder, left padding, PIL pictures. Code of the folder's own never runs.

    CheckpointError where a file names such code; else what transformers raises (OSError, ValueError, ...).
    """
    folder = Path(folder)
    refuse_folder_code(folder)
    own = read_object(folder / "config.json").get("model_type") == "qwen2_5_vl"
    kind: Any = Qwen2_5_VLProcessor if own else AutoProcessor
    processor = kind.from_pretrained(str(folder), backend=BACKEND, trust_remote_code=False, local_files_only=True)
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer.padding_side = "left"
    return processor


def reserved_mark(processor: Any, text: str) -> str | None:
    """The first mark in `text` that the processor would replace by a picture or a video; None for plain text.

    Text is text: a prompt that holds a mark is refused wherever it enters, because the processor cannot tell it from a picture's own.
    """
    marks = (getattr(processor, "image_token", None) or "<image>", getattr(processor, "video_token", None))
    return next((str(mark) for mark in marks if mark and str(mark) in text), None)


def image_backend(processor: Any) -> str:
    """ "pil" or "torchvision": what turns pictures into pixels; for result files, because the two differ in the last bits."""
    return "pil" if type(getattr(processor, "image_processor", None)).__name__.endswith("Pil") else "torchvision"
