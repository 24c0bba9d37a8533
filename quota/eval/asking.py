"""Loading a configuration and asking it one thing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quota.core.errors import UsageError
from quota.eval.generation import Generated, encode_prompts, generate, render_prompt, room_for_answer
from quota.models import find_family
from quota.models.processing import reserved_mark


@dataclass(frozen=True)
class Answer:
    """A text and what it took. `kept`: candidate layer -> bool [prompt tokens], empty without a recipe; `visual`: bool
    [prompt tokens].
    `pictures`: what each raster of visual tokens shows, the images or their tiles; `grids`: (rows, columns) of each
    where resolution is dynamic."""

    text: str
    made: Generated
    kept: dict[int, Tensor]
    visual: Tensor
    pictures: list[Any]
    grids: list[tuple[int, int]] | None = None

    def figures(self) -> dict[str, Any]:
        """Counts and costs, JSON-able. `kept`: candidate layer -> indices of the visual tokens alive from there on."""
        visual = int(self.visual.sum())
        grown = (
            len(self.visual) - visual + self.made.new_ids.shape[1] - 1
        )  # text and fed-back tokens: in every layer's cache
        by_layer = [n - grown for n in self.made.cache_tokens]
        return {
            "prompt_tokens": len(self.visual),
            "visual_tokens": visual,
            "visual_tokens_by_layer": by_layer,
            "average_visual_tokens": sum(by_layer) / len(by_layer),
            "new_tokens": self.made.new_ids.shape[1],
            "kept": {str(layer): mask.nonzero()[:, 0].tolist() for layer, mask in self.kept_visual().items()},
            "prefill_ms": self.made.prefill_ms,
            "decode_ms": self.made.decode_ms,
            "kv_bytes": self.made.cache_bytes,
            "gpu": None if self.made.gpu is None else asdict(self.made.gpu),
        }

    def kept_visual(self) -> dict[int, Tensor]:
        """candidate layer -> bool [visual tokens] in raster order, for drawing."""
        return {layer: mask[self.visual] for layer, mask in self.kept.items()}


def ask(model: Any, processor: Any, prompt: str, images: list[Any], *, max_new_tokens: int = 64) -> Answer:
    """One greedy answer to `prompt` as the chat template renders it, the images before it.

    UsageError for a prompt that holds the mark for an image, is no Unicode text, or leaves no room for an answer.
    """
    mark = reserved_mark(processor, prompt)
    if mark is not None:
        raise UsageError(
            f"prompt: must not contain {mark}; it stands for an image: give images by --image, they come before the"
            " text"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError(f"prompt: expected Unicode text, got {prompt!r}") from None
    inputs = encode_prompts(model, processor, [render_prompt(processor, prompt, len(images))], images)
    max_new_tokens = min(max_new_tokens, room_for_answer(model, inputs["input_ids"].shape[1]))
    made = generate(model, inputs, max_new_tokens=max_new_tokens)
    family = find_family(model)
    visual, given = family.visual(inputs)[0].cpu(), family.images(inputs)
    kept = {layer: torch.as_tensor(mask[0]).bool().cpu() for layer, mask in kept_masks(model).items()}
    text = processor.batch_decode(made.new_ids, skip_special_tokens=True)[0].strip()
    pictures = [part for image, own in zip(images, given, strict=True) for part in family.pictures(image, own)]
    grids = [raster.grid for own in given for raster in family.shown(own) if raster.grid is not None]
    return Answer(text, made, kept, visual, pictures, grids or None)


def kept_masks(model: Any) -> dict[int, Tensor]:
    """candidate layer -> bool [B, prompt tokens] of the last prompt; empty when no recipe is installed."""
    handle = getattr(model, "quota_handle", None)
    return dict(handle.kept) if handle is not None else {}
