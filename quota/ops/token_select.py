"""`token_select`: stable top-k per row."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton


def token_select_ref(score: Tensor, eligible: Tensor, keep: Tensor) -> Tensor:
    """score float32 [B, S], eligible bool [B, S], keep int64 [B] -> bool [B, S]: the keep[b] largest eligible scores.

    NaN ranks above every number, ties go to the lower index; with fewer eligible tokens than keep[b], all of them.
    Exactness: equal masks everywhere.
    """
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    order = order.gather(
        1, torch.sort((~eligible).gather(1, order).int(), dim=-1, stable=True).indices
    )  # the eligible first
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    return (rank < keep[:, None]) & eligible


token_select = Op(token_select_ref, native, triton)  # the first that supports the device
