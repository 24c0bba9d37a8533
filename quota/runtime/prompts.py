"""From a question or a conversation to what the engine runs: chat template, processor, images, and how much of the
prompt chooses the visual tokens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from quota.core import images as door
from quota.core.errors import CheckpointError, UsageError
from quota.models.processing import image_mark, render, reserved_mark, user_turn
from quota.runtime.engine import Prompt
from quota.runtime.engine.model import EngineModel

log = logging.getLogger(__name__)

Turn = Mapping[str, Any]  # {"role", "content": [{"type": "image"} or {"type": "text", "text": ...}]}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


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

    def question(self, text: str, images: Sequence[Any] = (), name: str = "prompt") -> Prompt:
        """One question about RGB images, which come first. UsageError, which begins with `name`, for text that holds
        the mark for an image or is no Unicode."""
        mark = reserved_mark(self.processor, text)
        if mark is not None:
            raise UsageError(f"{name}: must not contain {mark}; it stands for an image: give images beside the text")
        _check_unicode(text, name)
        return self.chat(user_turn(text, len(images)), images)

    def chat(self, turns: Sequence[Turn], images: Sequence[Any]) -> Prompt:
        """images: RGB, in the order of the turns' image parts. UsageError for text that contains the image mark."""
        turns = [{**turn, "role": _ROLES[turn["role"]]} for turn in turns]
        with self._lock:
            return self._processed(self._render(turns), images, turns)

    def rendered(self, text: str, images: Sequence[Any]) -> Prompt:
        """A prompt that was rendered already, an image mark for each of the RGB images; all of it chooses."""
        with self._lock:
            return self._processed(text, images, ())

    def text(self, prompt: str | list[int]) -> Prompt:
        """A prompt without images and without a template; ids are taken as they are."""
        if not isinstance(prompt, str):
            return Prompt(prompt)
        for mark in self._reserved:
            if mark in prompt:
                raise UsageError(f"prompt: must not contain {mark}; use /v1/chat/completions for images")
        with self._lock:
            return Prompt(self.processor.tokenizer(prompt)["input_ids"])

    def _processed(self, text: str, images: Sequence[Any], turns: Sequence[Turn]) -> Prompt:
        for mark in self._reserved:  # here and not in the parts: a template may join two of them to a mark
            if text.count(mark) != (len(images) if mark == self.mark else 0):
                raise UsageError(f"messages: text must not contain {mark}; send images as image_url parts")
        inputs = self.processor(text=[text], images=list(images) or None, images_kwargs={"return_tensors": "pt"})
        ids = inputs["input_ids"][0]
        made = self.model.images(inputs)
        return Prompt(ids, made, self._first_selection(turns, ids, inputs) if made and turns else None)

    def _render(self, turns: Sequence[Turn]) -> str:
        try:
            return render(self.processor, turns)
        except Exception as error:  # a template may raise anything about roles and their order
            raise UsageError(f"messages: the model's chat template refuses them ({error})") from None

    def _first_selection(self, turns: Sequence[Turn], ids: list[int], inputs: Any) -> int | None:
        """Tokens up to the first answer after the last image; None when that is the whole prompt.

        A later turn then prunes exactly as the first did, and reuses its keys and values. A template whose first turn
        is no prefix of the whole (some rewrite earlier turns) chooses by the whole prompt instead.
        """
        last = max(i for i, turn in enumerate(turns) if any(part["type"] == "image" for part in turn["content"]))
        if self.model.family.prefix:
            return None  # the first turn's tokens depend on what follows it
        answered = next((i for i in range(last + 1, len(turns)) if turns[i]["role"] == "assistant"), None)
        if answered is None:
            return None
        first, *parts = self._render(turns[:answered]).split(self.mark)
        for number, part in enumerate(parts):
            first += self.processor.replace_image_token(inputs, number) + part
        head = self.processor.tokenizer(first)["input_ids"]
        if ids[: len(head)] == head:
            return len(head)
        log.warning(
            "the chat template's first turn is no prefix of the chat: visual tokens are chosen by the whole prompt"
        )
        return None


def read_messages(messages: Sequence[Mapping[str, Any]], name: str = "messages") -> tuple[list[Turn], list[Any]]:
    """OpenAI-style messages -> (turns, RGB images in order).

    A message is {"role", "content"}; content is a text or a list of {"type": "text", "text"} and {"type": "image_url",
    "image_url": {"url": a data URL}} or {"type": "image", "image"}, where an image is whatever
    `quota.core.images.to_image` takes. A URL opens no file and nothing is fetched: messages may come from strangers.
    UsageError and ImageError, which begin with `name`, say which part is none.
    """
    if not messages:
        raise UsageError(f"{name}: expected at least one message, got none")
    turns: list[Turn] = []
    images: list[Any] = []
    for number, message in enumerate(messages):
        where = f"{name}[{number}]"
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in _ROLES:
            raise UsageError(f'{where}: expected "role" to be one of {", ".join(_ROLES)}, got {role!r}')
        given = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(given, Sequence):
            raise UsageError(f'{where}: expected "content" to be a text or a list of parts, got {content!r}')
        parts = []
        for place, part in enumerate(given):
            image = _image_of(part, f"{where}.content[{place}]")
            if image is not None and role == "user":
                images.append(door.to_image(image, name=f"{where}.content[{place}]"))
                parts.append({"type": "image"})
            elif image is None and isinstance(part, Mapping) and isinstance(part.get("text"), str):
                _check_unicode(part["text"], f"{where}.content[{place}]")
                parts.append({"type": "text", "text": part["text"]})
            else:
                kinds = "a text or, from a user, an image part" if role == "user" else "a text part (images: user only)"
                raise UsageError(f"{where}.content[{place}]: expected {kinds}, got {str(part)[:60]}")
        turns.append({"role": role, "content": parts})
    return turns, images


def _image_of(part: Any, name: str) -> Any:
    """The image of a part, None for one that holds none. ImageError for a URL that is no data URL."""
    if not isinstance(part, Mapping):
        return None
    if part.get("type") == "image":
        return part.get("image")
    url = part.get("image_url") if part.get("type") == "image_url" else None
    url = url.get("url") if isinstance(url, Mapping) else url
    return None if url is None else door.read_data_url(str(url), name=name)


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name}: expected Unicode text, got {text!r}") from None
