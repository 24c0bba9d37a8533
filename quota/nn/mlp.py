"""The quantized feed-forward blocks, gated and plain, and the activations that `quantize_act` computes on its way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from quota.nn.linear import SchemeLinear, as_dtype_of, as_float32, without_grad

_GATED = "silu_mul"  # of gate and up side by side
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": functional.gelu,
}
GATED_PROLOGUES = {"silu": "silu_mul", "swish": "silu_mul"}
PROLOGUES = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
_BLOCK_BYTES = (
    20 << 20
)  # of gate and up at once on CPU: stays in last-level caches, and in memory that malloc gives again without new pages


def activate(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of float32 x, computed in float64 and rounded once: vector bodies and scalar tails of float32 kernels
    disagree in the last bit, so a float32 result would depend on where a token lies in the batch."""
    return function(x.double()).float()


def activated(x: Tensor, prologue: str | None) -> Tensor:
    """x float32 [M, K], or [M, 2 K] for silu_mul -> [M, K]; as `ops.quantize_act`'s prologues, for layers whose kernels
    fuse none."""
    if prologue is None:
        return x
    if prologue != _GATED:
        return activate(_FUNCTIONS[prologue], x)
    gate, up = x.chunk(2, -1)
    return activate(functional.silu, gate) * up


class QuantMLP(nn.Module):
    """down(act(gate(x)) * up(x)); `gate_up_proj` holds the rows of gate, then of up."""

    def __init__(self, gate_up_proj: SchemeLinear, down_proj: SchemeLinear, act: str = "silu") -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, ACT2FN[act]
        self._prologue = GATED_PROLOGUES.get(act)

    @without_grad
    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> same shape and dtype. Rows do not depend on each other, so a long prompt goes in blocks of
        them."""
        rows = as_float32(x.reshape(-1, x.shape[-1]))
        blocks = -(-4 * len(rows) * self.gate_up_proj.out_features // _BLOCK_BYTES) if rows.is_cpu else 1
        y = (
            self._rows(rows)
            if blocks <= 1
            else torch.cat([self._rows(part) for part in rows.split(-(-len(rows) // blocks))])
        )
        return as_dtype_of(y.view(x.shape), x)

    def _rows(self, rows: Tensor) -> Tensor:
        both = self.gate_up_proj(rows)
        if self._prologue is not None:
            return self.down_proj(both, self._prologue)
        gate, up = both.chunk(2, -1)
        return self.down_proj(activate(self.act_fn, gate) * up)


class QuantFeedForward(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, fc1: SchemeLinear, fc2: SchemeLinear, act: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation_fn = fc1, fc2, ACT2FN[act]
        self._prologue = PROLOGUES.get(act)

    @without_grad
    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., hidden] -> same shape and dtype."""
        x = self.fc1(as_float32(hidden_states))
        if self._prologue is None:
            x = activate(self.activation_fn, x)
        return as_dtype_of(self.fc2(x, self._prologue), hidden_states)
