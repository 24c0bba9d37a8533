"""What the trainers of both families share: a stage of the schedule, the mask of packed segments, and what the loop
asks of a family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Binding a place to an object is learned last: the final stage asks for it more often.
HARD_MIX = {"existence": 6, "attribute": 2, "position": 7, "relation": 5, "counting": 4, "choice": 2}


@dataclass(frozen=True)
class Stage:
    """One leg of the schedule. `questions_per_task` 0 trains captions alone; `language` False the vision side alone;
    `hard_tasks` asks by HARD_MIX."""

    name: str
    steps: int
    size_px: int
    batch: int
    peak_lr: float
    questions_per_task: int = 0
    caption_share: float = 1.0
    dense_weight: float = 0.0
    language: bool = True
    hard_tasks: bool = False


def block_mask(segment: Tensor, prefix: int) -> Tensor:
    """Additive mask [B, 1, S, S]: the prefix is causal; a segment sees the prefix and itself, causally."""
    b = segment.shape[0]
    segment = torch.cat([segment.new_zeros(b, prefix), segment], 1)
    order = torch.arange(segment.shape[1], device=segment.device)
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    seen = same & (order[:, None] >= order[None, :])
    return torch.where(seen, 0.0, -1e9)[:, None]


@dataclass(frozen=True)
class Family:
    """What the loop (`tools.scenes.train`) must know of an architecture. batches: endless batches from the first
    image on."""

    schedule: tuple[Any, ...]
    width: int
    layers: int
    build: Callable[[Any, int, int, int], Any]  # stage, width, layers, seed -> model
    head: Callable[[int], nn.Module]  # width -> the dense head
    batches: Callable[[Any, int, int, int], IterableDataset]  # stage, first image, rank, world
    forward: Callable[
        ..., tuple[Tensor, dict[str, float]]
    ]  # model, head, batch, stage, amp -> this process's share of the loss, figures
    resize: Callable[[Any, Any, int, int], Any]  # model, stage, width, layers -> the model for that stage
    save: Callable[[Any, Path], None]
