"""What belongs to one call of a pruned model, and where it is kept while the call runs.

A model holds only what its recipe says. A forward's own state travels with it in keyword arguments (`Call`), what a
prompt's cache must remember lies in the cache (`Mark`), the prompt that `generate` was given is a context variable, and
the outcome of a prefill is kept per thread. So calls of several threads, nested calls and calls that end in an
exception cannot meet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quota.models.images import ImageIndex, ImageInfo, ImageTokens, PatchGrid
from quota.nn.attention import AttentionTrace

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


@dataclass
class Stage:
    """The tokens alive since the last drop. All [B, n]; rows with fewer tokens are padded on the left."""

    index: Tensor  # int64, column of the prompt
    valid: Tensor  # bool
    group: Tensor  # int64, the set of visual tokens it competes in (see `quota.prune.budget`), -1 for text
    text: Tensor  # bool, text queries
    dropped: Tensor  # int64 [B]
    start: Tensor | None  # int32 [B], None where nothing is padded
    rotary: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    mask_made: bool = False

    @property
    def visual(self) -> Tensor:
        return self.group >= 0


@dataclass
class Outcome:
    """What a prefill recorded: candidate -> bool [B, prompt tokens] alive from there on; candidate -> raw scores;
    tokens each decoder layer ran on."""

    kept: dict[int, Tensor] = field(default_factory=dict)
    signals: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    cache_lengths: list[int] = field(default_factory=list)


class LastOutcome(threading.local):
    """The outcome of this thread's last prefill."""

    value = Outcome()

    @torch.compiler.disable
    def set(self, outcome: Outcome) -> None:
        """Not traced: a compiled call would set it for the trace alone."""
        self.value = outcome


@dataclass
class Prefill:
    """One prompt on its way through the layers. `keep`: candidate -> visual tokens to keep [B, sets], only where some
    row drops any."""

    stage: Stage
    keep: dict[int, Tensor]
    first_column: Tensor  # int64 [B], the prompt's first real token
    tokens: int  # columns of this forward
    prompt: int  # columns of the prompt; those behind are drafted or, without a cache, generated, and never asked
    images: ImageTokens
    outcome: Outcome
    pruned: bool = False
    planes: Tensor | None = None  # of the tokens alive, [B, n, planes * d]: what is still to be added, one a layer
    trace: AttentionTrace | None = None
    prefix: bool = False  # the prompt's tokens see each other


@dataclass(frozen=True)
class Mark:
    """Left on a cache by the call that filled it. ahead: int64 [B, 1], rotary position minus column of every token
    behind the prompt; None where the model counts positions by itself."""

    recipe: Recipe
    ahead: Tensor | None


def ahead_of(positions: Tensor | None, mask: Tensor | None, tokens: int) -> Tensor | None:
    """int64 [B, 1]: rotary position minus column of whatever follows the prompt; positions [3 or 4, B, T], [B, T] or
    None."""
    if positions is None:
        return None
    rows = positions[None] if positions.ndim == 2 else positions[-3:]
    if mask is not None:
        rows = rows.masked_fill(mask == 0, -1)
    return rows.amax((0, 2))[:, None] + 1 - tokens


def continued_positions(ahead: Tensor | None, batch: int, first: int, end: int, device: torch.device) -> Tensor:
    """M-RoPE positions int64 [3, batch, end - first] of columns first .. end behind a prompt; ahead as in `Mark`."""
    columns = torch.arange(first, end, device=device).expand(batch, -1)
    if ahead is not None:
        columns = columns + ahead.to(device).repeat_interleave(batch // len(ahead), 0)
    return columns.expand(3, -1, -1)


@dataclass
class Call:
    """One forward. index [B, T]: see `Family.image_index`; shown: the rasters given with it; text: the language model
    it runs through."""

    index: ImageIndex | None
    shown: list[ImageInfo] | None = None
    text: Any = None
    prefill: Prefill | None = None
    mark: Mark | None = None
    padding: Tensor | None = None  # the tokenizer's mask, where the language model is given a ready-made one


@dataclass
class Lengths:
    """The cache as mask making sees it: one layer's own length, whatever it reports to `generate`."""

    stored: int
    is_compileable: bool = False

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.stored

    get_seq_length = get_query_offset

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.stored + query_length, 0


@dataclass(frozen=True)
class Seen:
    """What the images of a forward are: their grids, and where a recipe looks at them their rasters; both in order."""

    grids: list[PatchGrid | None]
    shown: list[ImageInfo] | None


_prompt: ContextVar[tuple[object, int | None]] = ContextVar("quota_prompt", default=(None, None))


@contextmanager
def generating(owner: object, prompt: int | None) -> Iterator[None]:
    """While open, forwards of this thread that `owner` watches know how many columns the prompt of `generate` has
    (None: not known)."""
    token = _prompt.set((owner, prompt))
    try:
        yield
    finally:
        _prompt.reset(token)


def prompt_columns(owner: object) -> int | None:
    """What `generating` was told for `owner`; None outside."""
    known, prompt = _prompt.get()
    return prompt if known is owner else None
