"""Left padding, the only kind decoder-only generation uses: a row is described by the index of its first real token."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.errors import UsageError

_REMEDY = "only left padding is supported: set processor.tokenizer.padding_side = 'left'"


def row_start(valid: Tensor) -> Tensor:
    """valid [B, S] (bool or 0/1) -> start [B] int32, the first real column of each row (S for an empty row).

    UsageError when a row has padding after a real token.
    """
    valid = valid.bool()
    start = valid.shape[1] - valid.sum(-1)
    if not torch.equal(valid, torch.arange(valid.shape[1], device=valid.device) >= start[:, None]):
        raise UsageError(f"attention_mask: found padding to the right of real tokens; {_REMEDY}")
    return start.int()


def start_of_mask(mask: Tensor, batch: int) -> Tensor:
    """Any mask transformers hands to a decoder layer -> start [B] int32 of the cached tokens.

    mask: [B, S], or [B or 1, 1, T, S] boolean (True = visible) or additive float. The last query sees every real token.
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UsageError(
            f"attention_mask: expected a tensor [B, S] or [B, 1, T, S], got {type(mask).__name__}; use"
            " attn_implementation='sdpa'"
        )
    if mask.ndim == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask >= 0
    return row_start(mask.expand(batch, -1))


def prefix_end(mask: Tensor | None, tokens: int) -> int:
    """Columns of a prompt of so many tokens that see each other, in a model where those of a prompt do: what a
    ready-made mask [B, 1, T, S] lets the first real query see, else all of them."""
    if mask is None or mask.ndim != 4:
        return tokens
    seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] >= 0
    start = int(row_start(seen[-1:])[0])
    return int(seen[min(start, tokens - 1)].nonzero().max()) + 1


def real_columns(start: Tensor, length: int) -> Tensor:
    """start [B] -> [B, length] bool, True from each row's first real token on."""
    return torch.arange(length, device=start.device) >= start[:, None]
