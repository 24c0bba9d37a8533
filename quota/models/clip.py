"""The part of CLIP's tower that LLaVA carries along without using it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPEncoderLayer


class UnusedLayer(CLIPEncoderLayer):
    """A layer above the one LLaVA takes its features from: same fields and state, not computed."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states, as they came."""
        return hidden_states
