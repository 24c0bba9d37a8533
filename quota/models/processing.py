"""Opening processors with one image backend (PIL), whatever is installed beside it: pixels must not depend on
torchvision being there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoProcessor
from transformers.processing_utils import ProcessorMixin

from quota.core.documents import read_object
from quota.models import FAMILIES, find_family
from quota.models.config import read_config, refuse_folder_code

BACKEND = "pil"


class WithoutVideos(ProcessorMixin):
    """Upstream's processor of a family for images and text, which needs no torchvision. Files name upstream's class, so
    the class made of the two has that name. video_type: the class that files name for videos.

    Videos are refused by the base class, which finds no video processor.
    """

    video_type: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes. Upstream's class wants a video processor where torchvision is installed; it
        has the images' sizes, as upstream's own fallback gives it."""
        out: dict[str, Any] = super().to_dict()
        videos = {name: value for name, value in out["image_processor"].items() if name != "image_processor_type"}
        out["video_processor"] = {**videos, "video_processor_type": self.video_type}
        return out


def open_processor(folder: str | Path) -> Any:
    """The processor of a checkpoint folder, left padding, PIL images. Code of the folder's own never runs.

    CheckpointError where a file names such code; else what transformers raises (OSError, ValueError, ...).
    """
    folder = Path(folder)
    refuse_folder_code(folder)
    kind = read_object(folder / "config.json").get("model_type")
    opened = find_family(read_config(folder)).open_processor if kind in FAMILIES else AutoProcessor.from_pretrained
    processor = opened(str(folder), backend=BACKEND, trust_remote_code=False, local_files_only=True)
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer.padding_side = "left"
    return processor


def reserved_mark(processor: Any, text: str) -> str | None:
    """The first mark in `text` that the processor would replace by an image or a video; None for plain text.

    Text is text: a prompt that holds a mark is refused wherever it enters, because the processor cannot tell it from a
    image's own.
    """
    marks = (image_mark(processor), getattr(processor, "video_token", None))
    return next((str(mark) for mark in marks if mark and str(mark) in text), None)


def image_backend(processor: Any) -> str:
    """ "pil" or "torchvision": what turns images into pixels; for result files, because the two differ in the last
    bits."""
    return "pil" if type(getattr(processor, "image_processor", None)).__name__.endswith("Pil") else "torchvision"


def image_mark(processor: Any) -> str:
    """The text that stands for one image in a rendered prompt."""
    return str(getattr(processor, "image_token", None) or "<image>")


def render(processor: Any, turns: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as the prompt that the processor takes, the assistant's turn opened: its chat template, or
    LLaVA-1.5's form where it has none.

    turns: {"role", "content": [{"type": "image"} or {"type": "text", "text": ...}]}. Raises what the template raises.
    """
    if getattr(processor, "chat_template", None):
        return str(processor.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False))
    return plain_prompt(turns, image_mark(processor))


def plain_prompt(turns: Sequence[Mapping[str, Any]], mark: str) -> str:
    """LLaVA-1.5's own form."""
    text = ""
    for turn in turns:
        marks = f"{mark}\n" * sum(part["type"] == "image" for part in turn["content"])
        words = " ".join(part["text"] for part in turn["content"] if part["type"] == "text")
        text += words + " " if turn["role"] == "system" else f"{turn['role'].upper()}: {marks}{words} "
    return text + "ASSISTANT:"


def user_turn(text: str, images: int) -> list[dict[str, Any]]:
    """One question about `images` images, which come first."""
    return [{"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}]
