"""Copies of models that share their tensors, so that threads can use a model each. Hooks, recipes and processors are a
copy's own."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from quota.models.quantize import weight_bytes

_SMALL_BYTES = 256 << 20  # of weights
Opened = TypeVar("Opened", bound=tuple[Any, ...])


def is_small(model: nn.Module) -> bool:
    """Whether the model's operations are too short to be shared out among threads, so that each thread better works on
    its own: a small one on the CPU."""
    device = next(model.parameters()).device
    return device.type == "cpu" and weight_bytes(model) <= _SMALL_BYTES


def copies_of(opened: Opened, count: int) -> list[Opened]:
    """`count` of a tuple of models and processors, the first of them itself."""
    models = [model for model in opened if isinstance(model, nn.Module)]
    tensors = {id(tensor): tensor for model in models for tensor in (*model.parameters(), *model.buffers())}
    return [opened, *(copy.deepcopy(opened, dict(tensors)) for _ in range(count - 1))]
