"""What the model sees of a request: the prompts and pictures of lmms-eval's built-in wrappers `llava_hf` and `qwen2_5_vl`.

One thing differs: transparency lies on white and EXIF's orientation is applied, as on every path of quota (the built-in wrappers show black, unturned).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from quota.core.errors import UsageError
from quota.core.images import to_rgb
from quota.eval.generation import render_prompt
from quota.models.processing import reserved_mark

TOKEN_PX = 28  # side of a visual token of the published Qwen2.5-VL checkpoints
PIXELS = (256 * TOKEN_PX**2, 1_605_632)  # limits the built-in `qwen2_5_vl` gives to the processor
_FETCHED = (4 * TOKEN_PX**2, 16_384 * TOKEN_PX**2)  # limits of qwen-vl-utils, which resizes first
MAX_NEW_TOKENS = {"llava": 1024, "qwen2_5_vl": 128}  # where a task sets none


@dataclass(frozen=True)
class Conversation:
    """One document as chat messages: {"role", "content": [{"type": "image"} or {"type": "text", "text"}]}, and its pictures in order."""

    messages: list[dict[str, Any]]
    pictures: list[Image]

    @property
    def text(self) -> str:
        return "\n".join(part["text"] for message in self.messages for part in message["content"] if part["type"] == "text")

    def fingerprint(self) -> str:
        """sha256 over roles, texts and pixels."""
        digest = hashlib.sha256(repr(self.messages).encode())
        for picture in self.pictures:
            digest.update(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
        return digest.hexdigest()


def conversation(messages: Sequence[dict[str, Any]], task: str) -> Conversation:
    """lmms-eval's messages, pictures as RGB (`quota.core.images`); UsageError for a task that shows anything but pictures."""
    out: list[dict[str, Any]] = []
    pictures: list[Image] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image" and isinstance(part["url"], Image):
                content.append({"type": "image"})
                pictures.append(to_rgb(part["url"]))
            else:
                raise UsageError(f"task {task}: expected pictures and text, got {part['type']} ({type(part.get('url')).__name__}); choose a picture task")
        out.append({"role": message["role"], "content": content})
    return Conversation(out, pictures)


class Wrapper:
    """Renders conversations for one checkpoint. pixels: (fewest, most) per picture for Qwen2.5-VL; None takes the built-in wrapper's."""

    def __init__(self, config: Any, processor: Any, pixels: tuple[int | None, int | None] = (None, None)) -> None:
        self.processor, self.family = processor, config.model_type
        vision = config.vision_config
        # other token sizes are not what the built-in wrapper is written for: their own processor decides alone
        self._refetch = self.family == "qwen2_5_vl" and vision.patch_size * vision.spatial_merge_size == TOKEN_PX
        if self.family != "qwen2_5_vl":
            if pixels != (None, None):
                raise UsageError(f"min_pixels, max_pixels: expected none for {self.family}, whose pictures have one size")
            return
        size = processor.image_processor.size
        usual = PIXELS if self._refetch else (size["shortest_edge"], size["longest_edge"])
        fewest, most = (given or own for given, own in zip(pixels, usual, strict=True))
        if fewest > most:
            raise UsageError(f"min_pixels: expected at most max_pixels ({most}), got {fewest}")
        processor.image_processor.size = {"shortest_edge": fewest, "longest_edge": most}

    @property
    def max_new_tokens(self) -> int:
        return MAX_NEW_TOKENS.get(self.family, 1024)

    def render(self, asked: Conversation) -> str:
        """The prompt with image marks, ready for the processor. UsageError for a text that holds one itself."""
        mark = reserved_mark(self.processor, asked.text)
        if mark is not None:
            raise UsageError(f"tasks: a question's text holds {mark}, which stands for a picture; choose a task whose texts are plain")
        if not getattr(self.processor, "chat_template", None):
            return render_prompt(self.processor, asked.text, len(asked.pictures))
        return self.processor.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)

    def prepare(self, picture: Image) -> Image:
        """The picture as the built-in wrapper hands it to the processor."""
        if not self._refetch:
            return picture
        width, height = picture.size
        rows, columns = smart_resize(height, width, factor=TOKEN_PX, min_pixels=_FETCHED[0], max_pixels=_FETCHED[1])
        return picture.resize((columns, rows))
