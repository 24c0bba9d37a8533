"""Recording q, k and the log-sum-exp of a float model's attention: an attention function that delegates to the one in
use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from quota.core.errors import UsageError
from quota.models import find_family, submodule
from quota.nn.attention import AttentionTrace, QuantAttention
from quota.nn.padding import prefix_end, start_of_mask

_PREFIX = "quota_"
_BASES = ("sdpa", "eager")
_ROWS_AT_ONCE = 128


def _recording(base: str) -> Any:
    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        quota_trace: AttentionTrace | None = None,
        **kwargs: Any,
    ) -> Any:
        if quota_trace is not None:
            scaling = kwargs.get("scaling") or module.scaling
            q, k = query.float().contiguous(), key.float().contiguous()
            quota_trace.q, quota_trace.k, quota_trace.scaling = q, k, scaling
            prompt = not module.is_causal and q.shape[2] == k.shape[2]
            whole = prefix_end(attention_mask, q.shape[2]) if prompt else 0
            quota_trace.lse = causal_lse(q, k, attention_mask, scaling, whole)
        deployed = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager_attention_forward)
        return deployed(module, query, key, value, attention_mask, **kwargs)

    return attention


def causal_lse(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, whole: int = 0) -> Tensor:
    """q [B, H, T, D] for the last T of the keys k [B, Hkv, S, D], the first `whole` of which see each other ->
    log-sum-exp [B, H, T] of what each query sees; -inf for padding."""
    batch, heads, tokens, _ = q.shape
    length = k.shape[2]
    start = torch.zeros(batch, dtype=torch.int32, device=q.device) if mask is None else start_of_mask(mask, batch)
    slot = torch.arange(length, device=q.device)
    out = q.new_empty(batch, heads, tokens)
    keys = k.repeat_interleave(heads // k.shape[1], 1)
    for first in range(0, tokens, _ROWS_AT_ONCE):
        rows = slot[length - tokens + first : length - tokens + min(first + _ROWS_AT_ONCE, tokens)]
        ends = torch.where(rows < whole, rows.clamp_min(whole - 1), rows)
        seen = (slot >= start[:, None, None]) & (slot <= ends[:, None]) & (rows[:, None] >= start[:, None, None])
        score = (q[:, :, first : first + len(rows)] @ keys.transpose(-1, -2) * scaling).masked_fill(
            ~seen[:, None], float("-inf")
        )
        out[:, :, first : first + len(rows)] = score.logsumexp(-1)
    return out


@contextmanager
def recording(text_model: Any) -> Iterator[None]:
    """While open, the float attentions of `text_model` accept `quota_trace=`. UsageError for another backend than sdpa
    or eager."""
    base = start_recording(text_model)
    try:
        yield
    finally:
        stop_recording(text_model, base)


@contextmanager
def attending(model: Any, read: Callable[[int, AttentionTrace], None]) -> Iterator[None]:
    """While open, `read(layer, trace)` is called with the attention trace of every decoder layer as it runs, float or
    quantized. UsageError as of `recording`."""
    text = submodule(model, find_family(model).text_path)
    layers: Any = text.layers

    def ask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "quota_trace": AttentionTrace()}

    def answered(layer: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        read(layer, kwargs["quota_trace"])

    with ExitStack() as stack:
        if any(not isinstance(layer.self_attn, QuantAttention) for layer in layers):
            stack.enter_context(recording(text))
        for number, layer in enumerate(layers):
            stack.callback(layer.self_attn.register_forward_pre_hook(ask, with_kwargs=True).remove)
            hook = layer.self_attn.register_forward_hook(partial(answered, number), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def start_recording(text_model: Any) -> str:
    """As `recording`; returns the backend for `stop_recording`."""
    base: str = text_model.config._attn_implementation
    if base.startswith(_PREFIX):
        raise UsageError(
            "recipe: one is already installed on this model or on another of the same configuration object; undo it"
            " first"
        )
    if base not in _BASES:
        raise UsageError(
            f"attn_implementation: expected one of {list(_BASES)} for a model with float attention, got {base!r}"
        )
    text_model.config._attn_implementation = _PREFIX + base
    return base


def stop_recording(text_model: Any, base: str) -> None:
    """Undo `start_recording`."""
    text_model.config._attn_implementation = base


for _base in _BASES:  # when this module is imported: a pickled model names the backend in whatever process opens it
    AttentionInterface.register(_PREFIX + _base, _recording(_base))
    AttentionMaskInterface.register(_PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])
