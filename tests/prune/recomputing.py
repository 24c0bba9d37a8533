"""Pruned answers by another way: no cache, no padding, no hooks, one row at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Merged embeddings [B, S, hidden], caught on their way into the text model."""
    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return seen[0]


@torch.no_grad()
def prompt_of(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Merged embeddings [S, hidden] and rotary positions [A, S] of one row without padding."""
    embeds = embeddings(model, inputs)[0]
    if not hasattr(model.model, "get_rope_index"):
        return embeds, torch.arange(len(embeds))[None]
    asked = {name: inputs.get(name) for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
    return embeds, model.model.get_rope_index(**asked)[0][:, 0]


@torch.no_grad()
def recompute(model: Any, embeds: Tensor, positions: Tensor, kept: dict[int, Tensor], compact: bool = False) -> Tensor:
    """Next-token logits [vocabulary]: embeds [S, hidden] of prompt and fed tokens, positions [A, prompt]; kept: layer
    -> alive prompt columns, bool [prompt]."""
    text = model.model.language_model
    axes, fed = len(positions), len(embeds) - positions.shape[1]
    # the unpruned counter goes on
    positions = torch.cat([positions, (positions.max() + 1 + torch.arange(fed)).expand(axes, -1)], -1)
    hidden, columns, places = embeds[None], torch.arange(len(embeds)), positions
    for number, layer in enumerate(text.layers):
        if number in kept:
            alive = torch.cat([kept[number], torch.ones(fed, dtype=torch.bool)])[columns]
            hidden, columns = hidden[:, alive], columns[alive]
            places = torch.arange(len(columns)).expand(axes, -1) if compact else positions[:, columns]
        n = hidden.shape[1]
        mask = torch.zeros(1, 1, n, n).masked_fill(~torch.ones(n, n).tril().bool(), torch.finfo(torch.float32).min)
        rotary = text.rotary_emb(hidden, position_ids=places[:, None] if axes > 1 else places)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return model.lm_head(text.norm(hidden))[0, -1]
