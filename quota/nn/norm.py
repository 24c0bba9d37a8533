"""RMSNorm whose rows do not depend on their batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quota import ops
from quota.nn.linear import as_dtype_of, as_float32, without_grad


class RmsNorm(nn.Module):
    """Takes the place, and the weight, of a LLaMA or Gemma normalisation: one pass instead of six, in a fixed order of
    summation. offset: what is added to the weight, in float32, so that a narrower dtype keeps its digits."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.offset = weight, eps, offset

    @classmethod
    def replacing(cls, norm: Any, offset: float = 0.0) -> RmsNorm:
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        return cls(norm.weight, eps, offset).train(norm.training)

    @without_grad
    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., hidden] -> same shape and dtype; computed in float32."""
        rows = as_float32(hidden_states.reshape(-1, hidden_states.shape[-1]))
        weight = as_float32(self.weight)
        weight = weight + self.offset if self.offset else weight
        return as_dtype_of(ops.rms_norm(rows, weight, self.variance_epsilon).view(hidden_states.shape), hidden_states)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"
