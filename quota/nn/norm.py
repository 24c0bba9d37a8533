"""RMSNorm whose rows do not depend on their batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quota import ops
from quota.nn.linear import as_dtype_of, as_float32, without_grad


class RmsNorm(nn.Module):
    """Takes the place, and the weight, of a LLaMA normalisation: one pass instead of six, in a fixed order of
    summation."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    @classmethod
    def replacing(cls, norm: Any) -> RmsNorm:
        return cls(norm.weight, norm.variance_epsilon).train(norm.training)

    @without_grad
    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., hidden] -> same shape and dtype; computed in float32."""
        rows = as_float32(hidden_states.reshape(-1, hidden_states.shape[-1]))
        return as_dtype_of(
            ops.rms_norm(rows, as_float32(self.weight), self.variance_epsilon).view(hidden_states.shape), hidden_states
        )

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"
