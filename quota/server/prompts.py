"""From messages to what the engine runs: chat template, processor, images, and how much of the prompt chooses the
visual tokens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from quota.core.errors import CheckpointError, UsageError
from quota.models.processing import image_mark, render
from quota.runtime.engine import Prompt
from quota.runtime.engine.model import EngineModel
from quota.server.schemas import Message, TextPart

log = logging.getLogger(__name__)


class PromptBuilder:
    """One processor behind a lock: fast tokenizers must not be used by two threads at once."""

    def __init__(self, processor: Any, engine_model: EngineModel) -> None:
        if processor is None:
            raise CheckpointError(
                "checkpoint: holds no processor files (processor_config.json, tokenizer.json); copy them from the float"
                " model"
            )
        self.processor, self.model = processor, engine_model
        self.mark = image_mark(self.processor)
        self._reserved = [self.mark, *filter(None, [getattr(self.processor, "video_token", None)])]
        self._lock = threading.Lock()

    def chat(self, messages: Sequence[Message], images: Sequence[Any]) -> Prompt:
        """images: RGB, in the order of the messages' image parts. UsageError for text that contains the image
        mark."""
        with self._lock:
            text = self._render(messages)
            for mark in self._reserved:  # here and not in the parts: a template may join two of them to a mark
                if text.count(mark) != (len(images) if mark == self.mark else 0):
                    raise UsageError(f"messages: text must not contain {mark}; send images as image_url parts")
            inputs = self.processor(text=[text], images=list(images) or None, return_tensors="pt")
            ids = inputs["input_ids"][0].tolist()
            images = self.model.images(inputs)
            selection = self._first_selection(messages, ids, images) if images else None
        return Prompt(ids, images, selection)

    def text(self, prompt: str | list[int]) -> Prompt:
        """A prompt without images; ids are taken as they are."""
        if not isinstance(prompt, str):
            return Prompt(prompt)
        for mark in self._reserved:
            if mark in prompt:
                raise UsageError(f"prompt: must not contain {mark}; use /v1/chat/completions for images")
        with self._lock:
            return Prompt(self.processor.tokenizer(prompt)["input_ids"])

    def _render(self, messages: Sequence[Message]) -> str:
        turns = [{"role": _role(message), "content": _parts(message)} for message in messages]
        try:
            return render(self.processor, turns)
        except Exception as error:  # a template may raise anything about roles and their order
            raise UsageError(f"messages: the model's chat template refuses them ({error})") from None

    def _first_selection(self, messages: Sequence[Message], ids: list[int], images: Sequence[Any]) -> int | None:
        """Tokens up to the first answer after the last image; None when that is the whole prompt.

        A later turn then prunes exactly as the first did, and reuses its keys and values. A template whose first turn
        is no prefix of the whole (some rewrite earlier turns) chooses by the whole prompt instead.
        """
        last = max(i for i, message in enumerate(messages) if message.images)
        answered = next((i for i in range(last + 1, len(messages)) if messages[i].role == "assistant"), None)
        if answered is None:
            return None
        first, *parts = self._render(messages[:answered]).split(self.mark)
        for image, part in zip(images, parts, strict=True):
            first += self.mark * self.model.image_tokens(image) + part
        head = self.processor.tokenizer(first)["input_ids"]
        if ids[: len(head)] == head:
            return len(head)
        log.warning(
            "the chat template's first turn is no prefix of the chat: visual tokens are chosen by the whole prompt"
        )
        return None


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _parts(message: Message) -> list[dict[str, str]]:
    if isinstance(message.content, str):
        return [{"type": "text", "text": message.content}]
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
    ]
