"""Pruned answers by another way: no cache, no padding, no hooks, one row at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quota.models import find_family


@torch.no_grad()
def embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Merged embeddings [B, S, (1 + planes) * hidden], caught on their way into the text model: behind the embeddings
    what is added to them after the first layers, one plane a layer."""
    seen: list[Tensor] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        embeds = kwargs["inputs_embeds"]
        planes = [embeds.new_zeros(embeds.shape) for _ in kwargs.get("deepstack_visual_embeds") or ()]
        for plane, given in zip(planes, kwargs.get("deepstack_visual_embeds") or (), strict=True):
            plane[kwargs["visual_pos_masks"]] = given
        seen.append(torch.cat([embeds, *planes], -1))

    handle = model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
    model(**inputs)
    handle.remove()
    return seen[0]


@torch.no_grad()
def prompt_of(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Merged embeddings [S, (1 + planes) * hidden] and rotary positions [A, S] of one row without padding."""
    embeds = embeddings(model, inputs)[0]
    if not hasattr(model.model, "get_rope_index"):
        return embeds, find_family(model).positions(model, inputs["input_ids"][0], [])
    asked = {name: inputs.get(name) for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
    return embeds, model.model.get_rope_index(**asked)[0][:, 0]


@torch.no_grad()
def recompute(model: Any, embeds: Tensor, positions: Tensor, kept: dict[int, Tensor], compact: bool = False) -> Tensor:
    """Next-token logits [vocabulary]: embeds [S, (1 + planes) * hidden] of prompt and fed tokens, positions [A,
    prompt]; kept: layer -> alive prompt columns, bool [prompt]."""
    text = model.model.language_model
    axes, fed = len(positions), len(embeds) - positions.shape[1]
    # the unpruned counter goes on
    positions = torch.cat([positions, (positions.max() + 1 + torch.arange(fed)).expand(axes, -1)], -1)
    columns, places, first = torch.arange(len(embeds)), positions, int(positions.min())
    hidden, *planes = embeds[None].split(text.config.hidden_size, -1)
    for number, layer in enumerate(text.layers):
        if number in kept:
            alive = torch.cat([kept[number], torch.ones(fed, dtype=torch.bool)])[columns]
            hidden, columns, planes = hidden[:, alive], columns[alive], [plane[:, alive] for plane in planes]
            places = (first + torch.arange(len(columns))).expand(axes, -1) if compact else positions[:, columns]
        n = hidden.shape[1]
        seen = torch.ones(n, n).tril().bool()
        if find_family(model).prefix:
            seen |= torch.arange(n) < n - fed
        mask = torch.zeros(1, 1, n, n).masked_fill(~seen, torch.finfo(torch.float32).min)
        rotary = text.rotary_emb(hidden, position_ids=places[:, None] if axes > 1 else places)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        if planes:
            hidden = hidden + planes.pop(0)
    return model.lm_head(text.norm(hidden))[0, -1]
