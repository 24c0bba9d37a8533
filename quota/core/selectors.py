"""The scores and policies a recipe may name, one row each: what it needs and what it is, in words.

Plain data: recipes are validated against these rows, and the JSON schema, `quota recipe explain` and `--help` are
written from their words. What a row computes is the function of its name in `quota.prune.scores` or
`quota.prune.policies`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# attention: what the attention of the layer before left; own_attention: that of the candidate layer itself; images:
# their content and shape; weights: the recipe's weights and percentiles.
Need = Literal["attention", "own_attention", "images", "weights"]


@dataclass(frozen=True)
class Score:
    """A value per visual token. words completes "score: ..."."""

    words: str
    needs: frozenset[Need] = frozenset()


@dataclass(frozen=True)
class Policy:
    """Chooses the tokens that stay from the values of those that compete. words completes "Tokens are chosen ...".
    parameter: the field of a selection that it reads."""

    words: str
    needs: frozenset[Need] = frozenset()
    uses_score: bool = True
    parameter: str | None = None


SCORES: dict[str, Score] = {
    "quota": Score("the weighted signals of equation (8)", frozenset({"attention", "weights"})),
    "text": Score("mean attention from the text after the image, in the layer before", frozenset({"attention"})),
    "last_token": Score("attention from the last prompt token, in the layer before", frozenset({"attention"})),
    "own_last_token": Score(
        "attention from the last prompt token, under the candidate's own projections", frozenset({"own_attention"})
    ),
    "cross_self": Score(
        "attention from text times attention from visual tokens, largest head each, in the layer before",
        frozenset({"attention"}),
    ),
    "relevance": Score("mean cosine to the word embeddings after the image"),
    "random": Score("a hash of seed, image and place in it", frozenset({"images"})),
    "none": Score("0 for every token, and ties go to the lower index"),
}

POLICIES: dict[str, Policy] = {
    "topk": Policy("by the largest scores"),
    "mmr": Policy(
        "greedily by mmr_score x score - (1 - mmr_score) x largest cosine to those kept", parameter="mmr_score"
    ),
    "maxmin": Policy("greedily, each the farthest in cosine from those kept", uses_score=False),
    "kcenter": Policy("greedily by distance in cosine from those kept x score^0.75"),
    "dpp": Policy("greedily for the largest determinant of score x cosine x score"),
    "grid": Policy(
        "evenly over the image for grid_share of the budget, the rest by score",
        frozenset({"images"}),
        parameter="grid_share",
    ),
}


def needs_of(score: str, policy: str) -> frozenset[Need]:
    """What choosing by `score` and `policy` reads; nothing of the score where the policy does not use it."""
    chosen = POLICIES[policy]
    return chosen.needs | SCORES[score].needs if chosen.uses_score else chosen.needs


def attention_free() -> list[str]:
    """Scores for where no attention has run yet: at the input of layer 0."""
    return [name for name, row in SCORES.items() if not row.needs & {"attention", "own_attention"}]
