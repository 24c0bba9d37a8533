"""OpenAI's response objects, whole or as server-sent events."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quota.runtime.engine import Output, TokenLogprob, Usage

DONE = "data: [DONE]\n\n"


@dataclass
class Choice:
    """One answer being collected."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str | None = None
    usage: Usage | None = None

    def add(self, output: Output) -> None:
        self.text += output.text
        self.logprobs += output.logprobs
        self.reason, self.usage = output.reason, output.usage


class Answer:
    """Builds the objects of one response; `chat` or plain completion."""

    def __init__(self, id: str, model: str, *, chat: bool, logprobs: bool, fingerprint: str) -> None:
        self.chat, self.logprobs = chat, logprobs
        self.head = {"id": id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The body of a response that is not streamed, as JSON."""
        listed = []
        for choice in choices:
            said = (
                {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                if self.chat
                else {"text": choice.text}
            )
            listed.append(
                {
                    "index": choice.index,
                    "finish_reason": choice.reason,
                    "logprobs": self._logprobs(choice.logprobs, 0),
                    **said,
                }
            )
        kind = "chat.completion" if self.chat else "text_completion"
        body = {
            "object": kind,
            **self.head,
            "choices": listed,
            "usage": usage([c.usage for c in choices if c.usage is not None]),
        }
        return _json(body).encode()

    def opening(self, index: int) -> str:
        """The first event of a choice; plain completions have none."""
        return (
            self._event(
                {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
            )
            if self.chat
            else ""
        )

    def delta(self, index: int, output: Output, offset: int) -> str:
        """What one step added. offset: characters of the tokens that were reported before."""
        reason = output.reason if output.reason in ("stop", "length") else None
        if not (output.text or output.logprobs or reason):
            return ""
        said = (
            {"delta": {"content": output.text} if output.text or output.logprobs else {}}
            if self.chat
            else {"text": output.text}
        )
        return self._event(
            {"index": index, "finish_reason": reason, "logprobs": self._logprobs(output.logprobs, offset), **said}
        )

    def closing(self, usages: Sequence[Usage]) -> str:
        """The event with the usage, where the client asked for it."""
        return _sse({"object": self._chunk, **self.head, "choices": [], "usage": usage(usages)})

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _event(self, choice: dict[str, Any]) -> str:
        return _sse({"object": self._chunk, **self.head, "choices": [choice]})

    def _logprobs(self, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {
                "content": [{**_entry(e), "top_logprobs": [_entry(other) for other in e.top]} for e in entries],
                "refusal": None,
            }
        lengths = [len(e.text) for e in entries]
        return {
            "tokens": [e.text for e in entries],
            "token_logprobs": [e.logprob for e in entries],
            "text_offset": list(itertools.accumulate(lengths[:-1], initial=offset))[: len(lengths)],
            "top_logprobs": [_by_text(e) for e in entries],
        }


def _entry(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": None if entry.utf8 is None else list(entry.utf8)}


def _by_text(entry: TokenLogprob) -> dict[str, float]:
    """The alternatives best first, and the token itself as OpenAI has it; of two with one text the likelier."""
    found: dict[str, float] = {}
    for other in (*entry.top, entry):
        found.setdefault(other.text, other.logprob)
    return found


def failure(body: dict[str, Any]) -> str:
    """An error after the stream began."""
    return _sse(body)


def _json(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def _sse(body: dict[str, Any]) -> str:
    return f"data: {_json(body)}\n\n"


def usage(usages: Sequence[Usage]) -> dict[str, Any]:
    """Tokens of all choices; the prompt counts once per prompt, as OpenAI counts it. `quota` is ours: visual tokens
    before and after pruning."""
    first = usages[0]
    kept = {} if first.kept is None else {"kept": {str(layer): list(tokens) for layer, tokens in first.kept.items()}}
    completion = sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        "quota": {
            "visual_tokens": first.visual_tokens,
            "visual_tokens_kept": first.visual_kept,
            "visual_tokens_by_layer": list(first.visual_by_layer),
            "selection_tokens": first.selection_tokens,
            **kept,
            "selection": "prompt" if first.selection_tokens == first.prompt_tokens else "first_turn",
        },
    }
