"""Quantized feed-forward blocks: LLaMA's gated MLP, CLIP's MLP, LLaVA's projector."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers.activations import ACT2FN

from quota.nn.linear import QuantLinear, as_dtype_of, as_float32, without_grad

_GATED_PROLOGUES = {"silu": "silu_mul", "swish": "silu_mul"}  # activations that `quantize_act` computes on its way
_PROLOGUES = {"quick_gelu": "quick_gelu"}


def activate(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of float32 x, computed in float64 and rounded once: vector bodies and scalar tails of float32 kernels disagree in the
    last bit, so a float32 result would depend on where a token lies in the batch."""
    return function(x.double()).float()


class QuantMLP(nn.Module):
    """down(act(gate(x)) * up(x)); `gate_up_proj` holds the rows of gate, then of up."""

    def __init__(self, gate_up_proj: QuantLinear, down_proj: QuantLinear, act: str = "silu") -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, ACT2FN[act]
        self._prologue = _GATED_PROLOGUES.get(act)

    @without_grad
    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> same shape and dtype."""
        both = self.gate_up_proj(as_float32(x.reshape(-1, x.shape[-1])))
        if self._prologue is not None:
            y = self.down_proj(both, self._prologue)
        else:
            gate, up = both.chunk(2, -1)
            y = self.down_proj(activate(self.act_fn, gate) * up)
        return as_dtype_of(y.view(x.shape), x)


class QuantClipMLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, fc1: QuantLinear, fc2: QuantLinear, act: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation_fn = fc1, fc2, ACT2FN[act]
        self._prologue = _PROLOGUES.get(act)

    @without_grad
    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., hidden] -> same shape and dtype."""
        x = self.fc1(as_float32(hidden_states))
        if self._prologue is None:
            x = activate(self.activation_fn, x)
        return as_dtype_of(self.fc2(x, self._prologue), hidden_states)


class QuantProjector(nn.Module):
    """linear_2(act(linear_1(x))): vision features to the language model's width."""

    def __init__(self, linear_1: QuantLinear, linear_2: QuantLinear, act: str) -> None:
        super().__init__()
        self.linear_1, self.linear_2, self.act = linear_1, linear_2, ACT2FN[act]

    @without_grad
    def forward(self, image_features: Tensor) -> Tensor:
        """image_features [..., vision hidden] -> [..., text hidden], same dtype."""
        return as_dtype_of(self.linear_2(activate(self.act, self.linear_1(as_float32(image_features)))), image_features)
