"""The pruned calibration graph: the float model's own scores decide which visual tokens the decoder's stream loses at a candidate layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quota import ops
from quota.calib.blocks import Batch, Block
from quota.calib.stream import QUERY, VISUAL, Stream
from quota.core.recipe import Recipe, kept_tokens
from quota.nn.attention import Record
from quota.nn.recording import causal_lse
from quota.nn.scores import combine, token_signals


@torch.no_grad()
def keep_masks(recipe: Recipe, layer: int, pair: tuple[Block, Block], stream: Stream, device: str) -> list[np.ndarray]:
    """Per item of `stream` (the input of decoder layer `layer - 1`): bool [length], False where `layer` drops the token.

    pair: the float blocks of layers `layer - 1` and `layer`. Text always stays. Items run one at a time, so the choice does not depend on batching.
    """
    before, after = pair
    ratio = dict(zip(recipe.candidates, recipe.keep, strict=True))[layer]
    attention: Any = before.layer.get_submodule("self_attn")
    masks = []
    for item in range(len(stream)):
        roles = torch.from_numpy(stream.roles[stream.rows(item)].copy())[None].to(device)
        visual = roles == VISUAL
        if not bool(visual.any()):
            masks.append(np.ones(stream.lengths[item], bool))
            continue
        batch = stream.batch([item], device)
        record, hidden = _recorded(before, attention, batch)
        signals = token_signals(record, hidden, after.layer, visual, _queries(roles), quant=recipe.weights.quant > 0)
        score = combine(signals, visual, recipe.weights, recipe.percentiles)
        budget = torch.tensor([_budget(recipe, ratio, stream, item)], device=device)
        keep = ops.token_select(score, visual, budget) | ~visual
        masks.append(keep[0].cpu().numpy())
    return masks


def gather(stream: Stream, masks: list[np.ndarray], compact: bool, target: Stream) -> Stream:
    """Copy the kept tokens of `stream` into `target` (made for the kept lengths) with their positions, renumbered if `compact`."""
    for item, mask in enumerate(masks):
        rows, kept = stream.rows(item), target.rows(item)
        target.write(item, stream.read(item)[torch.from_numpy(mask)])
        positions = stream.positions[rows][mask]
        target.positions[kept] = np.arange(len(positions)) if compact else positions
        target.roles[kept] = stream.roles[rows][mask]
    target.images = list(stream.images)
    return target


def _recorded(before: Block, attention: Any, batch: Batch) -> tuple[Record, Tensor]:
    attention.quota_trace = []
    try:
        hidden = before(batch)
        (query, key), record = attention.quota_trace[0], Record()
    finally:
        del attention.quota_trace
    query, key = query.float().contiguous(), key.float().contiguous()
    record.q, record.k, record.scaling = query, key, float(attention.scaling)
    record.lse = causal_lse(query, key, None, record.scaling)
    return record, hidden


def _queries(roles: Tensor) -> Tensor:
    """Text queries [1, S]; the last token where nothing follows the picture."""
    text = roles == QUERY
    if not bool(text.any()):
        text = text.clone()
        text[:, -1] = True
    return text


def _budget(recipe: Recipe, ratio: float, stream: Stream, item: int) -> int:
    """Equation (5) for one item: recorded tokens per picture, or the prompt's own count before any drop."""
    count, own = stream.images[item]
    return kept_tokens(ratio, own if recipe.reference == "per_image" else recipe.reference_tokens * count)
