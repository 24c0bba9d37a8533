"""The pruned calibration graph: the float model's own scores decide which visual tokens the decoder's stream loses at a candidate layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quota.calib.blocks import Batch, Block
from quota.calib.stream import QUERY, VISUAL, Stream
from quota.core.recipe import Recipe
from quota.nn.attention import Record
from quota.nn.budget import plan_budgets, select
from quota.nn.recording import causal_lse
from quota.nn.scores import combine, token_signals


@torch.no_grad()
def keep_masks(recipe: Recipe, layer: int, pair: tuple[Block, Block], stream: Stream, device: str) -> list[np.ndarray]:
    """Per item of `stream` (the input of decoder layer `layer - 1`): bool [length], False where `layer` drops the token.

    pair: the float blocks of layers `layer - 1` and `layer`. Text always stays. Items run one at a time, so the choice does not depend on batching.
    """
    before, after = pair
    ratio = dict(zip(recipe.candidates, recipe.keep, strict=True))[layer]
    attention = before.attention
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
        picture = torch.from_numpy(stream.picture[stream.rows(item)].astype(np.int64))[None].to(device).masked_fill(~visual, -1)
        keep = select(score, *plan_budgets(recipe, ratio, picture, [stream.images[item]])) | ~visual
        masks.append(keep[0].cpu().numpy())
    return masks


def gather(stream: Stream, masks: list[np.ndarray], compact: bool, target: Stream) -> Stream:
    """Copy the kept tokens of `stream` into `target` (made for the kept lengths) with their positions, renumbered if `compact`."""
    if stream.positions.ndim > 1:
        target.positions = np.zeros((len(target.positions), 3), np.int32)
    for item, mask in enumerate(masks):
        rows, kept = stream.rows(item), target.rows(item)
        target.write(item, stream.read(item)[torch.from_numpy(mask)])
        positions = stream.positions[rows][mask]
        numbers = np.arange(len(positions)).reshape(-1, *[1] * (positions.ndim - 1))
        target.positions[kept] = numbers if compact else positions
        target.roles[kept], target.picture[kept] = stream.roles[rows][mask], stream.picture[rows][mask]
    target.images = list(stream.images)
    return target


def _recorded(before: Block, attention: Any, batch: Batch) -> tuple[Record, Tensor]:
    attention.quota_trace = []
    try:
        hidden = before(batch)
        (query, key), record = attention.quota_trace[0], Record()
    finally:
        del attention.quota_trace
    record.q, record.k, record.scaling = query.float().contiguous(), key.float().contiguous(), float(attention.scaling)
    record.lse = causal_lse(record.q, record.k, None, record.scaling)
    return record, hidden


def _queries(roles: Tensor) -> Tensor:
    """Text queries [1, S]; the last token where nothing follows the picture."""
    text = roles == QUERY
    if not bool(text.any()):
        text = text.clone()
        text[:, -1] = True
    return text
