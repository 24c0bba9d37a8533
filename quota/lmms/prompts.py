"""What the model sees of a request: the prompts and images of lmms-eval's built-in wrappers `llava_hf` and
`qwen2_5_vl`.

One thing differs: transparency lies on white and EXIF's orientation is applied, as on every path of quota (the built-in
wrappers show black, unturned).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from quota.core.errors import UsageError
from quota.core.images import to_rgb
from quota.eval.generation import render_prompt
from quota.models import find_family
from quota.models.processing import reserved_mark


@dataclass(frozen=True)
class Conversation:
    """One document as chat messages: {"role", "content": [{"type": "image"} or {"type": "text", "text"}]}, and its
    images in order."""

    messages: list[dict[str, Any]]
    images: list[Image]

    @property
    def text(self) -> str:
        return "\n".join(
            part["text"] for message in self.messages for part in message["content"] if part["type"] == "text"
        )

    def fingerprint(self) -> str:
        """sha256 over roles, texts and pixels."""
        digest = hashlib.sha256(repr(self.messages).encode())
        for image in self.images:
            digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        return digest.hexdigest()


def conversation(messages: Sequence[dict[str, Any]], task: str) -> Conversation:
    """lmms-eval's messages, images as RGB (`quota.core.images`); UsageError for a task that shows anything but
    images."""
    out: list[dict[str, Any]] = []
    images: list[Image] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image" and isinstance(part["url"], Image):
                content.append({"type": "image"})
                images.append(to_rgb(part["url"]))
            else:
                raise UsageError(
                    f"task {task}: expected images and text, got {part['type']} ({type(part.get('url')).__name__});"
                    " choose an image task"
                )
        out.append({"role": message["role"], "content": content})
    return Conversation(out, images)


class Wrapper:
    """Renders conversations for one checkpoint. pixels: (fewest, most) per image for Qwen2.5-VL; None takes the
    built-in wrapper's."""

    def __init__(self, config: Any, processor: Any, pixels: tuple[int | None, int | None] = (None, None)) -> None:
        self.processor, family = processor, find_family(config)
        self.max_new_tokens = family.max_new_tokens
        self._resize = family.evaluation_pixels(processor, pixels)

    def render(self, asked: Conversation) -> str:
        """The prompt with image marks, ready for the processor. UsageError for a text that holds one itself."""
        mark = reserved_mark(self.processor, asked.text)
        if mark is not None:
            raise UsageError(
                f"tasks: a question's text holds {mark}, which stands for an image; choose a task whose texts are plain"
            )
        if not getattr(self.processor, "chat_template", None):
            return render_prompt(self.processor, asked.text, len(asked.images))
        return self.processor.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)

    def prepare(self, image: Image) -> Image:
        """The image as the built-in wrapper hands it to the processor."""
        return image if self._resize is None else self._resize(image)
