"""What a candidate chooses from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quota.core.errors import UsageError
from quota.models.images import ImageTokens
from quota.nn.attention import AttentionTrace


@dataclass
class Alive:
    """The tokens at the input of a candidate layer; rows are padded on the left. [B, n] where no shape is given.

    hidden [B, n, d]: input of the layer (merged embeddings at candidate 0). group int64: the set a visual token
    competes in, -1 for text. text bool: text queries. column int64: position in the prompt. trace: attention of the
    layer before, over the same n tokens. own_trace: runs the candidate layer's attention on them and returns its
    trace. signals: the quota score leaves its terms here, [B, n] each.
    """

    hidden: Tensor
    group: Tensor
    text: Tensor
    column: Tensor
    layer: Any
    images: ImageTokens
    trace: AttentionTrace | None = None
    own_trace: Callable[[], AttentionTrace] | None = None
    signals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def visual(self) -> Tensor:
        return self.group >= 0

    def recorded(self) -> AttentionTrace:
        """`trace`; UsageError where there is none."""
        if self.trace is None:
            raise UsageError(
                "attention: the layer before a pruning layer recorded nothing; it was replaced after the recipe was"
                " installed"
            )
        return self.trace
