"""The tokens of a prefill from one drop to the next: gathering those that stay, and the rotary embedding, mask and
cache layer that a decoder layer needs for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from quota import ops
from quota.core.formats import scheme_of
from quota.nn.attention import AttentionTrace
from quota.nn.cache import Rows, kv_layer, pruned_layer
from quota.nn.kv import kv_kind
from quota.prune.call import Call, Lengths, Prefill, Stage

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


def advance(prefill: Prefill, keep: Tensor, hidden: Tensor) -> Tensor:
    """hidden [B, n, d] -> [B, n', d], the tokens of `keep` bool [B, n]; the prefill enters its next stage where any is
    missing."""
    stage = prefill.stage
    if torch.equal(keep, stage.valid):
        return hidden
    counts = keep.sum(-1)
    order = torch.sort(keep.int(), dim=-1, stable=True).indices[
        :, hidden.shape[1] - int(counts.max()) :
    ]  # dropped first, kept in order last
    index, valid, group, text = (
        t.gather(1, order) for t in (stage.index, keep, stage.group.masked_fill(~keep, -1), stage.text & keep)
    )
    start = (order.shape[1] - counts).int()
    prefill.stage = Stage(
        index, valid, group, text, stage.dropped + stage.valid.sum(-1) - counts, start if bool(start.any()) else None
    )
    prefill.pruned = True
    if prefill.planes is not None:
        prefill.planes = ops.token_gather(prefill.planes, order)
    return ops.token_gather(hidden, order)


def raised(prefill: Prefill, hidden: Tensor) -> Tensor:
    """hidden [B, n, d] with the next plane, where there is one left."""
    planes, width = prefill.planes, hidden.shape[-1]
    if planes is None:
        return hidden
    prefill.planes = planes[..., width:].contiguous() if planes.shape[-1] > width else None
    return hidden + planes[..., :width].to(hidden)


def own_trace(recipe: Recipe, call: Call, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> AttentionTrace:
    """What the attention of `layer` itself makes of its input, without touching the cache."""
    assert call.prefill is not None
    trace = AttentionTrace()
    inputs = {"attention_mask": kwargs["attention_mask"], "position_embeddings": kwargs["position_embeddings"]}
    if call.prefill.pruned:
        inputs = _inputs(recipe, call, layer, hidden, kwargs)
    layer.self_attn(layer.input_layernorm(hidden), past_key_values=None, quota_trace=trace, **inputs)
    return trace


def align(recipe: Recipe, call: Call, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
    """Give a layer after a drop the rotary embedding, mask and cache layer of its own tokens."""
    prefill, cache = call.prefill, kwargs.get("past_key_values")
    assert prefill is not None
    if cache is not None:
        rows = rows_of(cache, number, layer)
        rows.start, rows.dropped = prefill.stage.start, prefill.stage.dropped
        rows.removed = prefill.tokens - hidden.shape[1] if number == 0 else 0
    # position ids with gaps would be read as packed sequences, so no layer sees them
    kwargs.update(_inputs(recipe, call, layer, hidden, kwargs), position_ids=None)


def _inputs(recipe: Recipe, call: Call, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Mask and rotary embedding of the stage's tokens for `layer`."""
    assert call.prefill is not None
    stage = call.prefill.stage
    if stage.rotary is None:
        stage.rotary = _rotary(recipe, call, stage, hidden, kwargs)
    valid, prefill = None if stage.start is None else stage.valid, call.prefill
    if scheme_of(layer.self_attn).kv is not None and not prefill.prefix:
        return {"attention_mask": valid, "position_embeddings": stage.rotary}
    if not stage.mask_made:
        own = hidden.shape[1] - (prefill.tokens - prefill.prompt)  # of the prompt
        stage.mask = float_mask(call.text, hidden, valid, 0, own if prefill.prefix else 0)
        stage.mask_made = True
    return {"attention_mask": stage.mask, "position_embeddings": stage.rotary}


def _rotary(recipe: Recipe, call: Call, stage: Stage, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if recipe.position_policy == "compact":
        assert call.prefill is not None
        first = _first_position(kwargs.get("position_ids"), call.prefill.first_column)
        return call.text.rotary_emb(hidden, position_ids=(first + stage.valid.long().cumsum(-1) - 1).clamp_min(0))
    cos, sin = (t.expand(len(stage.index), -1, -1) for t in kwargs["position_embeddings"])
    return ops.token_gather(cos, stage.index), ops.token_gather(sin, stage.index)


def rows_of(cache: Any, number: int, layer: Any) -> Rows:
    """The cache layer of decoder layer `number`."""
    form = scheme_of(layer.self_attn).kv
    return pruned_layer(cache, number) if form is None else kv_layer(cache, number, kv_kind(form))


def float_mask(text: Any, hidden: Tensor, valid: Tensor | None, stored: int, whole: int = 0) -> Any:
    """The causal mask of `hidden`'s tokens behind `stored` cached ones, in the form the model's attention backend
    wants. whole: the first tokens, which see each other."""
    lengths: Any = Lengths(stored)
    blocks = None
    if whole:
        column = torch.arange(hidden.shape[1], device=hidden.device)
        blocks = torch.where(column < whole, 0, -1).expand(len(hidden), -1)
    return create_causal_mask(
        config=text.config,
        inputs_embeds=hidden,
        attention_mask=valid,
        past_key_values=lengths,
        position_ids=None,
        block_sequence_ids=blocks,
        layer_idx=0,
    )


def _first_position(positions: Tensor | None, first_column: Tensor) -> Tensor:
    """[B, 1]: the rotary position of each row's first real token; 0 where a model keeps only positions of several
    axes."""
    if positions is None:
        return torch.zeros_like(first_column)[:, None]
    rows = positions.expand(len(first_column), -1)
    return rows.gather(1, first_column.clamp_max(rows.shape[1] - 1)[:, None])
