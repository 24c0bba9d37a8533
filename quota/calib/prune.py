"""The pruned calibration graph: the float model's own choice decides which visual tokens the decoder's stream loses at
a candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quota.calib.blocks import Batch, Block
from quota.calib.stream import QUERY, VISUAL, Stream
from quota.core.recipe import Recipe
from quota.models.images import ImageIndex, ImageTokens
from quota.nn.attention import AttentionTrace
from quota.prune.alive import Alive
from quota.prune.budget import plan_budgets
from quota.prune.recording import causal_lse
from quota.prune.select import choose


@torch.no_grad()
def keep_masks(
    recipe: Recipe,
    candidate: int,
    pair: tuple[Block | None, Block],
    stream: Stream,
    shown: Callable[[int], tuple[ImageIndex, ImageTokens]],
    device: str,
) -> list[np.ndarray]:
    """Per item of `stream`: bool [length], False where `candidate` drops the token.

    pair: the float blocks of layers `candidate - 1` (`stream` is its input) and `candidate`; for candidate 0 there is
    no first one and `stream` is the input of layer 0. shown: where the images of one item stand, on the columns of its
    prompt and on the device.
    Text always stays. Items run one at a time, so the choice does not depend on batching.
    """
    before, after = pair
    ratio = dict(zip(recipe.candidates, recipe.keep, strict=True))[candidate]
    masks = []
    for item in range(len(stream)):
        roles = torch.from_numpy(stream.roles[stream.rows(item)].copy())[None].to(device)
        visual = roles == VISUAL
        if not bool(visual.any()):
            masks.append(np.ones(stream.lengths[item], bool))
            continue
        batch = stream.batch([item]).to(torch.device(device))
        trace = None
        if before is not None:
            trace, hidden = _recorded(before, batch)
            if stream.rest:  # the plane that goes in between the two
                hidden = hidden + stream.read_rows(item)[1][None, :, : stream.width].to(hidden)
            batch = replace(batch, hidden=hidden)
        column = torch.from_numpy(stream.columns[stream.rows(item)].astype(np.int64))[None].to(device)
        whole, tokens = shown(item)
        index = ImageIndex(*(part.gather(1, column) for part in whole))
        group, budget = plan_budgets(recipe, ratio, index, whole)
        alive = Alive(
            batch.hidden,
            group,
            _queries(roles),
            column,
            after.layer,
            tokens,
            trace,
            partial(_trace, after, batch),
        )
        masks.append((choose(recipe, candidate, alive, budget) | ~visual)[0].cpu().numpy())
    return masks


def gather(stream: Stream, path: Path, compact: bool, origin: int = 0) -> Stream:
    """The rows of `stream` that it does not drop, in a new file, with their positions, renumbered from `origin` on if
    `compact`."""
    kept = [~stream.drops[stream.rows(item)] for item in range(len(stream))]
    target = stream.like(path, lengths=[int(mask.sum()) for mask in kept])
    target.positions = np.zeros((len(target.positions), *stream.positions.shape[1:]), np.int32)
    for item, mask in enumerate(kept):
        rows, to = stream.rows(item), target.rows(item)
        target.write(item, *(part[torch.from_numpy(mask)] for part in stream.read_rows(item)))
        positions = stream.positions[rows][mask]
        numbers = np.arange(origin, origin + len(positions)).reshape(-1, *[1] * (positions.ndim - 1))
        target.positions[to] = numbers if compact else positions
        target.roles[to], target.columns[to] = stream.roles[rows][mask], stream.columns[rows][mask]
    return target


def _trace(block: Block, batch: Batch) -> AttentionTrace:
    return _recorded(block, batch)[0]


def _recorded(block: Block, batch: Batch) -> tuple[AttentionTrace, Tensor]:
    """What the block's attention left, and the block's output."""
    with block.recording() as calls:
        hidden = block(batch)
    (query, key), trace = calls[0], AttentionTrace()
    query, key = query.float().contiguous(), key.float().contiguous()
    trace.q, trace.k, trace.scaling = query, key, float(block.attention.scaling)
    whole = 0 if block.attention.is_causal else query.shape[2]
    trace.lse = causal_lse(query, key, None, trace.scaling, whole)
    return trace, hidden


def _queries(roles: Tensor) -> Tensor:
    """Text queries [1, S]; the last token where nothing follows the image."""
    text = roles == QUERY
    if not bool(text.any()):
        text = text.clone()
        text[:, -1] = True
    return text
