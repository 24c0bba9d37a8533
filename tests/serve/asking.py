"""Asking a served model, and what transformers' generate says."""

from __future__ import annotations

from typing import Any

import torch


def ask(server: Any, *messages: Any, **options: Any) -> Any:
    """A greedy chat of at most 8 tokens through the official client."""
    return server.client.chat.completions.create(
        model="tiny", messages=list(messages), **{"temperature": 0, "max_tokens": 8, **options}
    )


def generated(model: Any, text: str, images: list[Any], tokens: int = 8) -> str:
    """The answer to a whole prompt, greedy."""
    inputs = model.processor(text=[text], images=images or None, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(model.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
