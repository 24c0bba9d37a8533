"""Pruning visual tokens between decoder layers with forward pre-hooks; the model's own forwards stay as they are.

Before each candidate layer the recipe's selection chooses among the visual tokens alive, and only the kept ones go on: hidden states,
rotary positions, masks and the layer caches all follow. Tokens are dropped at prefill only.

Candidate -1 chooses among the merged embeddings, before layer 0 sees them. Layer 0's cache then holds the kept tokens and still reports the
whole prompt's length, by which `generate` and the text model count positions.

Positions. "original": kept tokens keep the prompt's rotary positions and decoding continues the unpruned counter. "compact": inside each
layer the alive tokens are renumbered without gaps from the row's first position, and decoding at a layer continues from that layer's own
last number; what a layer cached and what it computes later therefore always use one numbering. Under M-RoPE "original" keeps a token's three
positions together; "compact" gives the alive tokens one consecutive number for all three, so the picture's layout is no longer in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from quota import ops
from quota.arch import find_arch, submodule
from quota.core.errors import UsageError
from quota.core.keep import ATTENTION_SCORES, BEFORE
from quota.nn.attention import QuantAttention, Record
from quota.nn.budget import plan_drops
from quota.nn.cache import Rows, kv4_layer, pruned_layer
from quota.nn.padding import real_columns, row_start
from quota.nn.pictures import Pictures, Shown, shown_pictures
from quota.nn.recording import start_recording
from quota.nn.scores import text_queries
from quota.nn.select import Alive, asks_for_pictures, choose

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


@dataclass
class Stage:
    """The tokens alive since the last drop. All [B, n]; rows with fewer tokens are padded on the left."""

    index: Tensor  # int64, column of the prompt
    valid: Tensor  # bool
    group: Tensor  # int64, the set of visual tokens it competes in (see `quota.nn.budget`), -1 for text
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
class Prefill:
    """One prompt on its way through the layers. `keep`: candidate -> visual tokens to keep [B, sets], only where some row drops any."""

    stage: Stage
    keep: dict[int, Tensor]
    first_column: Tensor  # int64 [B], the prompt's first real token
    tokens: int  # columns of the prompt
    pictures: Pictures
    pruned: bool = False
    record: Record | None = None


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


class Pruner:
    """Installs a recipe on a model, float or quantized. `remove()` takes every trace away.

    forced: candidate layer -> bool [B, prompt tokens] to keep instead of the scored choice (visual tokens only; others stay).
    After a prefill `kept` maps each candidate to bool [B, prompt tokens] (True = alive from there on) and `cache_lengths` lists the tokens
    each decoder layer ran on; `signals` maps each candidate that dropped tokens to its raw scores when `keep_signals` is set.
    """

    def __init__(self, model: Any, recipe: Recipe, forced: Mapping[int, Tensor] | None = None) -> None:
        self.model, self.recipe, self.forced = model, recipe, forced
        self.arch = find_arch(model)
        self.text: Any = submodule(model, self.arch.text_path)
        layers: Any = self.text.layers
        self.ratios = dict(zip(recipe.candidates, recipe.keep, strict=True))
        self.kept: dict[int, Tensor] = {}
        self.signals: dict[int, dict[str, Tensor]] = {}
        self.keep_signals = False
        self.cache_lengths: list[int] = []
        self._picture: Tensor | None = None
        self._shown: list[Shown] | None = None
        self._float_layers = [not isinstance(layer.self_attn, QuantAttention) for layer in layers]
        self._restore = start_recording(self.text) if any(self._float_layers) else None
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.get_submodule(self.arch.model_path).register_forward_pre_hook(self._before_merge, with_kwargs=True),
            self.text.register_forward_pre_hook(self._before_text, with_kwargs=True),
        ]
        if forced is None and asks_for_pictures(recipe):
            vision = submodule(model, self.arch.vision_path)
            self._handles.append(vision.register_forward_pre_hook(self._before_vision, with_kwargs=True))
        for number, layer in enumerate(layers):
            self._handles.append(layer.register_forward_pre_hook(self._before_layer(number), with_kwargs=True))

    def remove(self) -> None:
        """Undo the installation. Calling it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._restore is not None:
            self._restore()
            self._restore = None

    # what the hooks see, from the outside in

    def _before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None:
            raise UsageError("labels: a pruned forward returns logits of the surviving tokens only, so a loss is undefined; undo the recipe first")

    def _before_merge(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._picture = None if ids is None else self.arch.image_index(ids)

    def _before_vision(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else kwargs["pixel_values" if "pixel_values" in kwargs else "hidden_states"]
        self._shown = shown_pictures(pixels, kwargs.get("grid_thw"), self.arch.merge)

    def _before_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        picture, self._picture = self._picture, None
        embeds, mask, cache = kwargs.get("inputs_embeds"), kwargs.get("attention_mask"), kwargs.get("past_key_values")
        cached = 0 if cache is None else cache.get_seq_length()
        if embeds is None or (embeds.shape[1] == 1 and cached):
            return None
        if picture is None:
            if not cached:
                raise UsageError("input_ids: expected token ids, got embeddings only; pruning must know which tokens are visual")
            picture = torch.full(embeds.shape[:2], -1, device=embeds.device)
        if cached:
            self._check_continuation(picture >= 0, mask)
            return None
        return args, {**kwargs, "quota_prefill": self._prefill(picture, mask, cache)}

    def _check_continuation(self, visual: Tensor, mask: Any) -> None:
        if bool(visual.any()):
            raise UsageError(
                "past_key_values: image tokens arrived after cached ones; pruning ranks a whole prompt at once, so give all images in one "
                "prefill (no prefill_chunk_size, no new images on a cached conversation)"
            )
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, -visual.shape[1] :].all()):
            raise UsageError("attention_mask: padding inside a continued conversation is not supported; continue rows one at a time")

    def _prefill(self, picture: Tensor, mask: Any, cache: Any) -> Prefill:
        batch, tokens = picture.shape
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UsageError("attention_mask: expected [B, prompt tokens] with a recipe installed, got a ready-made mask; pass the tokenizer's mask")
        if mask is not None and mask.shape[1] != tokens:
            raise UsageError(
                f"attention_mask: expected {tokens} columns, one per prompt token, got {mask.shape[1]}; pruning needs the whole prompt in one prefill "
                "(no prefill_chunk_size, no static cache)"
            )
        if cache is not None and any(layer.is_compileable for layer in cache.layers):
            raise UsageError("past_key_values: a static cache cannot hold pruned layers; leave cache_implementation unset")
        valid = torch.ones_like(picture, dtype=torch.bool) if mask is None else mask.bool()
        start = row_start(valid)
        real = picture.masked_fill(~valid, -1)
        group, keep = self._plan(real)
        stage = Stage(
            torch.arange(tokens, device=picture.device).expand(batch, -1), valid, group, text_queries(picture >= 0, valid),
            torch.zeros(batch, dtype=torch.int64, device=picture.device), start if bool(start.any()) else None,
        )  # fmt: skip
        self.kept, self.signals, self.cache_lengths = {}, {}, [tokens] * self.arch.layers
        shown, self._shown = self._shown, None
        return Prefill(stage, keep, start.long(), tokens, Pictures.of(real, shown))

    def _plan(self, picture: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """picture [B, S] -> the sets tokens compete in, and equation (5) for each; only candidates where some set has more tokens than its budget."""
        if self.forced is not None:
            return picture, {layer: torch.zeros(0) for layer in self.ratios} if bool((picture >= 0).any()) else {}
        return plan_drops(self.recipe, picture)

    def _before_layer(self, number: int) -> Any:
        candidate = BEFORE if number == 0 else number
        asked = number + 1 in self.ratios and self.forced is None and self.recipe.selection_at(number + 1).score in ATTENTION_SCORES

        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            prefill: Prefill | None = kwargs.pop("quota_prefill", None)
            if prefill is None:
                return self._decode(number, args, kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            if candidate in prefill.keep:
                hidden = self._drop(prefill, candidate, layer, hidden, kwargs)
            if candidate in self.ratios:
                stage = prefill.stage
                self.kept[candidate] = torch.zeros_like(stage.valid[:, :1]).repeat(1, prefill.tokens).scatter(1, stage.index, stage.valid)
            self.cache_lengths[number] = hidden.shape[1]
            if prefill.pruned:
                self._align(prefill, number, hidden, kwargs)
            if asked and number + 1 in prefill.keep:
                prefill.record = kwargs["quota_record"] = Record()
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _drop(self, prefill: Prefill, candidate: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """hidden [B, n, d] -> the kept tokens' [B, n', d]; `prefill` enters its next stage."""
        stage = prefill.stage
        if self.forced is not None:
            mask = self.forced[candidate].to(hidden.device)
            chosen = mask.gather(1, stage.index.clamp_max(mask.shape[1] - 1)) | (stage.index >= mask.shape[1])
        else:
            alive = Alive(
                hidden, stage.group, stage.text, stage.index, layer, prefill.pictures, prefill.record,
                lambda: self._own_record(prefill, max(candidate, 0), layer, hidden, kwargs),
            )  # fmt: skip
            signals: dict[str, Tensor] = {}
            chosen = choose(self.recipe, candidate, alive, prefill.keep[candidate], signals)
            prefill.record = None
            if self.keep_signals:
                self.signals[candidate] = signals
        keep = stage.valid & (chosen | ~stage.visual)
        if torch.equal(keep, stage.valid):
            return hidden
        counts = keep.sum(-1)
        order = torch.sort(keep.int(), dim=-1, stable=True).indices[:, hidden.shape[1] - int(counts.max()) :]  # dropped first, kept in order last
        index, valid, group, text = (t.gather(1, order) for t in (stage.index, keep, stage.group.masked_fill(~keep, -1), stage.text & keep))
        start = (order.shape[1] - counts).int()
        prefill.stage = Stage(index, valid, group, text, stage.dropped + stage.valid.sum(-1) - counts, start if bool(start.any()) else None)
        prefill.pruned = True
        return ops.token_gather(hidden, order)

    def _own_record(self, prefill: Prefill, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Record:
        """What the attention of layer `number` itself makes of its input, without touching the cache."""
        record = Record()
        inputs = {"attention_mask": kwargs["attention_mask"], "position_embeddings": kwargs["position_embeddings"]}
        if prefill.pruned:
            inputs = self._inputs(prefill, number, hidden, kwargs)
        layer.self_attn(layer.input_layernorm(hidden), past_key_values=None, quota_record=record, **inputs)
        return record

    def _align(self, prefill: Prefill, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Give a layer after a drop the rotary embedding, mask and cache layer of its own tokens."""
        stage, cache = prefill.stage, kwargs.get("past_key_values")
        if cache is not None:
            rows = self._cache_layer(cache, number)
            rows.start, rows.dropped = stage.start, stage.dropped
            rows.removed = prefill.tokens - hidden.shape[1] if number == 0 else 0
        # position ids with gaps would be read as packed sequences, so no layer sees them
        kwargs.update(self._inputs(prefill, number, hidden, kwargs), position_ids=None)

    def _inputs(self, prefill: Prefill, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Mask and rotary embedding of the stage's tokens for layer `number`."""
        stage = prefill.stage
        if stage.rotary is None:
            stage.rotary = self._rotary(stage, prefill.first_column, hidden, kwargs)
        valid = None if stage.start is None else stage.valid
        if not self._float_layers[number]:
            return {"attention_mask": valid, "position_embeddings": stage.rotary}
        if not stage.mask_made:
            stage.mask, stage.mask_made = self._float_mask(hidden, valid, 0), True
        return {"attention_mask": stage.mask, "position_embeddings": stage.rotary}

    def _rotary(self, stage: Stage, first_column: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.recipe.position_policy == "compact":
            first = _first_position(kwargs.get("position_ids"), first_column)
            return self.text.rotary_emb(hidden, position_ids=(first + stage.valid.long().cumsum(-1) - 1).clamp_min(0))
        cos, sin = (t.expand(len(stage.index), -1, -1) for t in kwargs["position_embeddings"])
        return ops.token_gather(cos, stage.index), ops.token_gather(sin, stage.index)

    def _decode(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        cache = kwargs.get("past_key_values")
        rows = cache.layers[number] if cache is not None and number < len(cache.layers) else None
        if getattr(rows, "dropped", None) is None or rows is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.recipe.position_policy == "compact":
            positions = kwargs.get("position_ids")
            if positions is None:  # M-RoPE without generate: the next number of this layer's own row
                started = rows.stored - (0 if rows.start is None else rows.start.long()[:, None])
                positions = started + torch.arange(hidden.shape[1], device=hidden.device)
            else:
                positions = positions - rows.dropped[:, None]
            positions = positions.expand(hidden.shape[0], -1)
            kwargs["position_embeddings"] = self.text.rotary_emb(hidden, position_ids=positions)
        mask = None
        if self._float_layers[number] and (rows.start is not None or hidden.shape[1] > 1):
            valid = None if rows.start is None else real_columns(rows.start, rows.stored + hidden.shape[1])
            mask = self._float_mask(hidden, valid, rows.stored)
        kwargs.update(attention_mask=mask, position_ids=None)
        return args, kwargs

    def _float_mask(self, hidden: Tensor, valid: Tensor | None, stored: int) -> Any:
        """The causal mask of `hidden`'s tokens behind `stored` cached ones, in the form the model's attention backend wants."""
        lengths: Any = Lengths(stored)
        return create_causal_mask(config=self.text.config, inputs_embeds=hidden, attention_mask=valid, past_key_values=lengths, position_ids=None, layer_idx=0)

    def _cache_layer(self, cache: Any, number: int) -> Rows:
        return pruned_layer(cache, number) if self._float_layers[number] else kv4_layer(cache, number)


def _first_position(positions: Tensor | None, first_column: Tensor) -> Tensor:
    """[B, 1]: the rotary position of each row's first real token; 0 where a model keeps only positions of several axes."""
    if positions is None:
        return torch.zeros_like(first_column)[:, None]
    rows = positions.expand(len(first_column), -1)
    return rows.gather(1, first_column.clamp_max(rows.shape[1] - 1)[:, None])
