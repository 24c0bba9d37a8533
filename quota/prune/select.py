"""One interface for choosing: a recipe's candidate names a score and a policy, `choose` applies them to the tokens
alive there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quota import ops
from quota.core.errors import UsageError
from quota.models.images import ImageTokens
from quota.nn.attention import AttentionTrace
from quota.prune import policies
from quota.prune.scores import combine, cross_self, last_token_attention, text_attention, token_signals

if TYPE_CHECKING:
    from quota.core.recipe import Recipe, Selection

_INDIFFERENT = ("maxmin",)  # policies that do not look at the score


def needs_images(recipe: Recipe) -> bool:
    """Whether some candidate looks at the images themselves: at their content, or at where in them a token lies."""
    return any(s.score == "random" or s.policy == "grid" for s in map(recipe.selection_at, recipe.candidates))


@dataclass
class Alive:
    """What a candidate chooses from; rows are padded on the left. [B, n] unless said otherwise.

    hidden [B, n, d]: input of the candidate layer (merged embeddings at candidate -1). group int64: the set a visual
    token competes in, -1 for text. text bool: text queries. column: place in the prompt. record: attention of the layer
    before, over the same n tokens. own_record: runs the candidate layer's attention on them and returns what it left.
    """

    hidden: Tensor
    group: Tensor
    text: Tensor
    column: Tensor
    layer: Any
    pictures: ImageTokens
    trace: AttentionTrace | None = None
    own_record: Callable[[], AttentionTrace] | None = None

    @property
    def visual(self) -> Tensor:
        return self.group >= 0


def choose(
    recipe: Recipe, candidate: int, alive: Alive, keep: Tensor, signals: dict[str, Tensor] | None = None
) -> Tensor:
    """keep int64 [B, sets] -> bool [B, n]: the visual tokens that stay at `candidate`, keep[b, g] of each set g or all
    where there are fewer.

    signals: filled with the terms of the quota score, if given. Deterministic; a row's choice does not depend on the
    others.
    """
    selection, visual = recipe.selection_at(candidate), alive.visual
    if selection.policy in _INDIFFERENT or not keep.numel() or not int(keep.max()):
        score = alive.hidden.new_zeros(visual.shape, dtype=torch.float32)
    else:
        score = token_scores(recipe, selection, alive, signals)
    chosen = torch.zeros_like(visual)
    for number, budgets in enumerate(keep.unbind(1)):
        own = alive.group == number
        if selection.policy == "topk":
            chosen |= ops.token_select(score, own, budgets.contiguous())
            continue
        for row, budget in enumerate(budgets.tolist()):
            columns = own[row].nonzero()[:, 0]
            budget = min(budget, len(columns))
            if budget:
                places = _row(selection, alive, row, columns, score[row, columns], budget)
                chosen[row, columns[torch.as_tensor(places, device=columns.device)]] = True
    return chosen


def _row(selection: Selection, alive: Alive, row: int, columns: Tensor, score: Tensor, keep: int) -> list[int]:
    """Indices into `columns`, the places of one set of the row's visual tokens."""
    if keep == len(columns):
        return list(range(keep))
    value = score.float().cpu().numpy()
    if selection.policy == "grid":
        return policies.grid(value, _places(alive, row, columns), alive.pictures.grids[row], keep, selection.grid_share)
    similarity = policies.cosines(alive.hidden[row, columns])
    if selection.policy == "maxmin":
        return policies.maxmin(similarity, keep)
    if selection.policy == "mmr":
        return policies.mmr(value, similarity, keep, selection.mmr_score)
    return policies.dpp(value, similarity, keep)


def _places(alive: Alive, row: int, columns: Tensor) -> np.ndarray:
    """int64 [V, 3]: image, row and column of each visual token."""
    prompt = alive.column[row, columns]
    number, place = (t[row, prompt].cpu().numpy() for t in (alive.pictures.number, alive.pictures.place))
    width = np.array([columns_ for _, columns_ in alive.pictures.grids[row]], dtype=np.int64)[number]
    return np.stack([number, place // width, place % width], axis=-1)


def token_scores(
    recipe: Recipe, selection: Selection, alive: Alive, signals: dict[str, Tensor] | None = None
) -> Tensor:
    """The selection's score, float32 [B, n], 0 where not visual."""
    name = selection.score
    if name == "quota":
        terms = token_signals(
            _recorded(alive), alive.hidden, alive.layer, alive.visual, alive.text, quant=recipe.weights.quant != 0
        )
        if signals is not None:
            signals.update(terms)
        return combine(terms, alive.visual, recipe.weights, recipe.percentiles)
    if name == "text":
        return text_attention(_recorded(alive), alive.visual, alive.text)
    if name == "last_token":
        return last_token_attention(_recorded(alive), alive.visual)
    if name == "own_last_token":
        assert alive.own_record is not None
        return last_token_attention(alive.own_record(), alive.visual)
    if name == "cross_self":
        return cross_self(_recorded(alive), alive.visual, alive.text)
    score = alive.hidden.new_zeros(alive.visual.shape, dtype=torch.float32)
    if name != "none":
        fill = _relevance if name == "relevance" else _random
        for row in range(len(score)):
            columns = alive.visual[row].nonzero()[:, 0]
            if len(columns):
                score[row, columns] = fill(recipe, alive, row, columns).to(score.device)
    return score


def _recorded(alive: Alive) -> AttentionTrace:
    if alive.trace is None:
        raise UsageError(
            "attention: the layer before a pruning layer recorded nothing; it was replaced after the recipe was"
            " installed"
        )
    return alive.trace


def _relevance(recipe: Recipe, alive: Alive, row: int, columns: Tensor) -> Tensor:
    """Mean cosine of each visual token to the row's text tokens [V].

    The published method asks CLIP's text tower, which a LLaVA checkpoint does not hold; here both sides are what the
    language model reads. Its code takes the negative of CLIP's cosine, because there patches resemble least the words
    for what they show; in this space they resemble them most (embedded model as in `policies.dpp`, top-k: 73 % right,
    of the negative 38 %).
    """
    words = alive.hidden[row, alive.text[row]]
    return torch.from_numpy(
        policies.cosines(alive.hidden[row, columns], words).sum(-1) / (policies.ONE * len(words))
    ).float()


def _random(recipe: Recipe, alive: Alive, row: int, columns: Tensor) -> Tensor:
    digests = alive.pictures.digests
    if digests is None:
        raise UsageError(
            "pixel_values: the random score is seeded by the images' content, and none was encoded; pass pixels, not"
            " features"
        )
    prompt = alive.column[row, columns]
    number, place = (t[row, prompt].cpu().numpy() for t in (alive.pictures.number, alive.pictures.place))
    return torch.from_numpy(policies.random_scores(recipe.seed, digests[row], number, place))
