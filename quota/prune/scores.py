"""The scores: one function of every row of `quota.core.selectors.SCORES`, and of its name.

Each takes the tokens alive and the recipe and returns float32 [B, n], 0 where a token is not visual; a row does not
depend on the others. A larger value is a token worth keeping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quota.core.errors import UsageError
from quota.prune import greedy
from quota.prune.alive import Alive
from quota.prune.attention import head_max_attention, mean_attention
from quota.prune.signals import combine, token_signals

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


def quota(alive: Alive, recipe: Recipe) -> Tensor:
    """Equation (8)."""
    terms = token_signals(
        alive.recorded(), alive.hidden, alive.layer, alive.visual, alive.text, quant=recipe.weights.quant != 0
    )
    alive.signals.update(terms)
    return combine(terms, alive.visual, recipe.weights, recipe.percentiles)


def text(alive: Alive, recipe: Recipe) -> Tensor:
    return mean_attention(alive.recorded(), alive.visual, alive.text)


def last_token(alive: Alive, recipe: Recipe) -> Tensor:
    """What FastV's code ranks by."""
    return mean_attention(alive.recorded(), alive.visual, _last(alive))


def own_last_token(alive: Alive, recipe: Recipe) -> Tensor:
    """What PyramidDrop's code ranks by."""
    assert alive.own_trace is not None
    return mean_attention(alive.own_trace(), alive.visual, _last(alive))


def cross_self(alive: Alive, recipe: Recipe) -> Tensor:
    """FitPrune: attention of the largest head, mean over the text queries times mean over the visual queries."""
    trace, visual = alive.recorded(), alive.visual
    return head_max_attention(trace, visual, alive.text) * head_max_attention(trace, visual, visual)


def relevance(alive: Alive, recipe: Recipe) -> Tensor:
    """Mean cosine of each visual token to the row's text tokens.

    The published method (CDPruner) asks CLIP's text tower, which a LLaVA checkpoint does not hold; here both sides are
    what the language model reads. Its code takes the negative of CLIP's cosine, because there patches resemble least
    the words for what they show; in this space they resemble them most (embedded model as in `greedy.dpp`, top-k: 73 %
    right, of the negative 38 %).
    """

    def cosine(row: int, columns: Tensor) -> Tensor:
        words = alive.hidden[row, alive.text[row]]
        total = greedy.cosines(alive.hidden[row, columns], words).sum(-1)
        return torch.from_numpy(total / (greedy.ONE * len(words))).float()

    return _per_row(alive, cosine)


def random(alive: Alive, recipe: Recipe) -> Tensor:
    """Seeded by what the images show, so an image's order is the same in any prompt, batch and layer."""
    digests = alive.images.digests
    if digests is None:
        raise UsageError(
            "pixel_values: the random score is seeded by the images' content, and none was encoded; pass pixels, not"
            " features"
        )

    def hashed(row: int, columns: Tensor) -> Tensor:
        prompt = alive.column[row, columns]
        number, place = (t[row, prompt].cpu().numpy() for t in (alive.images.number, alive.images.place))
        return torch.from_numpy(greedy.random_scores(recipe.seed, digests[row], number, place))

    return _per_row(alive, hashed)


def none(alive: Alive, recipe: Recipe) -> Tensor:
    return alive.hidden.new_zeros(alive.visual.shape, dtype=torch.float32)


def _last(alive: Alive) -> Tensor:
    """bool [B, n]: the last token of each row."""
    last = torch.zeros_like(alive.visual)
    last[:, -1] = True
    return last


def _per_row(alive: Alive, values: Callable[[int, Tensor], Tensor]) -> Tensor:
    """values(row, columns int64 [V] of its visual tokens) -> float32 [V], for every row with visual tokens."""
    score = alive.hidden.new_zeros(alive.visual.shape, dtype=torch.float32)
    for row in range(len(score)):
        columns = alive.visual[row].nonzero()[:, 0]
        if len(columns):
            score[row, columns] = values(row, columns).to(score.device)
    return score
