"""How much text and visual queries attend to each visual token, from what one attention left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quota import ops
from quota.core.errors import UsageError
from quota.nn.attention import AttentionTrace
from quota.ops.token_score import attention_to


def text_queries(shown: Tensor, valid: Tensor) -> Tensor:
    """shown (tokens that hold an image's features), valid [B, S] bool -> [B, S] bool: real tokens after the row's last
    image; its last token where there are none."""
    column = torch.arange(shown.shape[1], device=shown.device)
    last_shown = torch.where(shown, column, -1).amax(-1, keepdim=True)
    text = valid & (column > last_shown)
    none = ~text.any(-1, keepdim=True)
    return text | (none & valid & (column == shown.shape[1] - 1))


def filled(trace: AttentionTrace) -> tuple[Tensor, Tensor | ops.Kv, Tensor]:
    """q, k and lse of a trace. UsageError where nothing was recorded."""
    if trace.q is None or trace.k is None or trace.lse is None:
        raise UsageError(
            "attention: the layer before a pruning layer recorded nothing; it was replaced after the recipe was"
            " installed"
        )
    return trace.q, trace.k, trace.lse


def mean_attention(trace: AttentionTrace, visual: Tensor, queries: Tensor) -> Tensor:
    """Attention of `queries` bool [B, S] to each visual token, mean over heads and queries: float32 [B, S], 0 where not
    visual (bool [B, S])."""
    return _column_mean(trace, visual, queries, torch.mean)


def head_max_attention(trace: AttentionTrace, visual: Tensor, queries: Tensor) -> Tensor:
    """The same of the largest head instead of the mean over heads."""
    return _column_mean(trace, visual, queries, torch.amax)


def _column_mean(trace: AttentionTrace, visual: Tensor, queries: Tensor, over_heads: Callable[..., Tensor]) -> Tensor:
    """Softmax rows in float64, rounded once, so that the result does not depend on the order of summation."""
    (q, _, lse), k = filled(trace), trace.float_keys()
    out = q.new_zeros(visual.shape)
    for row in range(len(visual)):
        columns, asking = visual[row].nonzero()[:, 0], queries[row].nonzero()[:, 0]
        if not len(columns) or not len(asking):
            continue
        total = torch.zeros(len(columns), dtype=torch.float64, device=q.device)
        for p in attention_to(q[row], k[row], lse[row], columns, asking, trace.scaling):
            total += over_heads(p, 0).sum(0)
        out[row, columns] = (total / len(asking)).float()
    return out
