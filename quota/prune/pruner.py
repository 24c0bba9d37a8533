"""Pruning visual tokens between decoder layers with forward pre-hooks; the model's own forwards stay as they are.

Before each candidate layer the recipe's selection chooses among the visual tokens alive, and only the kept ones go on:
hidden states, rotary positions, masks and the layer caches all follow. Tokens are dropped at prefill only.

Candidate -1 chooses among the merged embeddings, before layer 0 sees them. Layer 0's cache then holds the kept tokens
and still reports the whole prompt's length, by which `generate` and the text model count positions.

Positions. "original": kept tokens keep the prompt's rotary positions and decoding continues the unpruned counter.
"compact": inside each layer the alive tokens are renumbered without gaps from the row's first position, and decoding at
a layer continues from that layer's own last number; what a layer cached and what it computes later therefore always use
one numbering. Under M-RoPE "original" keeps a token's three positions together; "compact" gives the alive tokens one
consecutive number for all three, so the image's layout is no longer in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from quota import ops
from quota.core.errors import UsageError
from quota.core.formats import scheme_of
from quota.core.keep import ATTENTION_SCORES, BEFORE
from quota.models import Family, find_family, submodule
from quota.models.images import ImageTokens, image_infos
from quota.nn.attention import AttentionTrace
from quota.nn.cache import Rows, RowState, kv4_layer, pruned_layer
from quota.nn.padding import real_columns, row_start
from quota.prune.budget import plan_drops
from quota.prune.call import (
    Call,
    LastOutcome,
    Lengths,
    Mark,
    Outcome,
    Prefill,
    Stage,
    ahead_of,
    continued_positions,
    prompt_columns,
)
from quota.prune.recording import start_recording, stop_recording
from quota.prune.scores import text_queries
from quota.prune.select import Alive, choose, needs_images

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


class Pruner:
    """Installs a recipe on a model, float or quantized. `remove()` takes every trace away.

    forced: candidate layer -> bool [B, prompt tokens] to keep instead of the scored choice (visual tokens only; others
    stay). After a prefill `kept` maps each candidate to bool [B, prompt tokens] (True = alive from there on) and
    `cache_lengths` lists the tokens each decoder layer ran on; `signals` maps each candidate that dropped tokens to its
    raw scores when `keep_signals` is set. All three are of the last prefill of the thread that reads them. Threads may
    share the model; a deep copy has the recipe installed for itself.
    """

    def __init__(self, model: Any, recipe: Recipe, forced: Mapping[int, Tensor] | None = None) -> None:
        family = find_family(model)
        self.text: Any = submodule(model, family.text_path)
        if any(isinstance(getattr(hook, "__self__", None), Watch) for hook in self.text._forward_pre_hooks.values()):
            raise UsageError("recipe: one is already installed on this model; undo it first")
        self.watch = watch = Watch(family, recipe, forced)
        layers: Any = self.text.layers
        self._base = (
            start_recording(self.text) if any(scheme_of(layer.self_attn).kv is None for layer in layers) else None
        )
        self._handles: list[Any] = [
            model.register_forward_pre_hook(watch.before_model, with_kwargs=True),
            model.get_submodule(family.model_path).register_forward_pre_hook(watch.before_merge, with_kwargs=True),
            self.text.register_forward_pre_hook(watch.before_text, with_kwargs=True),
            self.text.register_forward_hook(watch.after_text, with_kwargs=True),
        ]
        vision = submodule(model, family.vision_path)
        self._handles.append(vision.register_forward_pre_hook(watch.before_vision, with_kwargs=True))
        self._handles.append(vision.register_forward_hook(watch.after_vision, with_kwargs=True))
        for number, layer in enumerate(layers):
            self._handles.append(layer.register_forward_pre_hook(partial(watch.before_layer, number), with_kwargs=True))

    @property
    def kept(self) -> dict[int, Tensor]:
        return self.watch.last.value.kept

    @property
    def signals(self) -> dict[int, dict[str, Tensor]]:
        return self.watch.last.value.signals

    @property
    def cache_lengths(self) -> list[int]:
        return self.watch.last.value.cache_lengths

    @property
    def keep_signals(self) -> bool:
        return self.watch.keep_signals

    @keep_signals.setter
    def keep_signals(self, keep: bool) -> None:
        self.watch.keep_signals = keep

    def remove(self) -> None:
        """Undo the installation. Calling it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._base is not None:
            stop_recording(self.text, self._base)
            self._base = None


class Watch:
    """The hooks of one recipe. It knows no module and keeps nothing of a call but its outcome, so a submodule may be
    deep-copied with its hooks."""

    def __init__(self, family: Family, recipe: Recipe, forced: Mapping[int, Tensor] | None = None) -> None:
        self.family, self.recipe, self.forced = family, recipe, forced
        self.ratios = dict(zip(recipe.candidates, recipe.keep, strict=True))
        self.needs_images = forced is None and needs_images(recipe)
        self.keep_signals = False
        self.last = LastOutcome()

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        copy = memo[id(self)] = Watch(self.family, self.recipe, self.forced)
        copy.keep_signals = self.keep_signals
        return copy

    def __reduce__(self) -> Any:
        raise UsageError(
            "pickle: a model under a recipe cannot be pickled (transformers' own hooks cannot); call quota.load(...,"
            " recipe=...) in the worker"
        )

    # what the hooks see, from the outside in

    def before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None:
            raise UsageError(
                "labels: a pruned forward returns logits of the surviving tokens only, so a loss is undefined; undo the"
                " recipe first"
            )

    def before_merge(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        ids = kwargs.get("input_ids", args[0] if args else None)
        call = Call(None if ids is None else self.family.image_index(ids))
        if self.needs_images:
            pixels, grids = kwargs.get("pixel_values"), kwargs.get("image_grid_thw")
            if pixels is None:
                call.shown = getattr((kwargs.get("mm_encoder_outputs") or {}).get("image"), "quota_shown", None)
            else:
                call.shown = image_infos(
                    pixels if grids is None else pixels.type(module.visual.dtype), grids, self.family.merge
                )
        return args, {**kwargs, "quota_call": call, **self._positions(ids, kwargs)}

    def before_vision(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {name: value for name, value in kwargs.items() if name != "quota_call"}

    def after_vision(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """`generate` encodes images before its first forward and hands the features on: what they show goes with
        them."""
        if self.needs_images and not isinstance(output, tuple):
            pixels = args[0] if args else kwargs["pixel_values" if "pixel_values" in kwargs else "hidden_states"]
            output.quota_shown = image_infos(pixels, kwargs.get("grid_thw"), self.family.merge)

    def before_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        embeds, mask, cache = kwargs.get("inputs_embeds"), kwargs.get("attention_mask"), kwargs.get("past_key_values")
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = ids if embeds is None else embeds
        if given is None:
            return None  # upstream says what is missing
        call: Call = kwargs.get("quota_call") or Call(None if ids is None else self.family.image_index(ids))
        call.text = module
        if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in module.layers):
            raise UsageError(
                "gradient_checkpointing: layers would run again without the tokens they were given; undo the recipe, or"
                " call model.eval()"
            )
        cached = 0 if cache is None else cache.get_seq_length()
        tokens = given.shape[1]
        if cached:
            call.mark = self.mark_of(cache)
            if tokens > 1:
                self._check_continuation(call.image_index, mask, cached, tokens)
        elif call.image_index is None:
            raise UsageError(
                "input_ids: expected token ids, got embeddings only; pruning must know which tokens are visual"
            )
        else:
            call.prefill = self._prefill(call, mask, cache)
            call.mark = Mark(
                self.recipe, ahead_of(kwargs.get("position_ids"), mask, tokens) if self.family.axes > 1 else None
            )
        if cache is not None:
            cache.quota_mark = None  # until this call has filled all its layers
        return args, {**kwargs, "quota_call": call}

    def after_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            cache.quota_mark = kwargs["quota_call"].mark

    def mark_of(self, cache: Any) -> Mark:
        mark: Mark | None = getattr(cache, "quota_mark", None)
        if mark is None:
            raise UsageError(
                "past_key_values: expected a cache filled under this recipe, got one that another model or no recipe"
                " filled, or whose last call is not finished; start from an empty cache"
            )
        if mark.recipe is not self.recipe and mark.recipe != self.recipe:
            raise UsageError(
                "past_key_values: expected a cache filled under this recipe, got one of another recipe; start from an"
                " empty cache"
            )
        return mark

    def _positions(self, ids: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """M-RoPE positions of a continued prompt, where they are not given: upstream would take the offset of the last
        prompt anyone gave the model."""
        cache = kwargs.get("past_key_values")
        if (
            self.family.axes == 1
            or kwargs.get("position_ids") is not None
            or cache is None
            or ids is None
            or not cache.get_seq_length()
        ):
            return {}
        cached, ahead = cache.get_seq_length(), self.mark_of(cache).ahead
        return {"position_ids": continued_positions(ahead, len(ids), cached, cached + ids.shape[1], ids.device)}

    def _check_continuation(self, image_index: Tensor | None, mask: Any, cached: int, tokens: int) -> None:
        known = prompt_columns(self)
        own = tokens if known is None else max(known - cached, 0)  # behind them: what `generate` drafted
        if image_index is not None and bool((image_index[:, :own] >= 0).any()):
            raise UsageError(
                "past_key_values: image tokens arrived after cached ones; pruning ranks a whole prompt at once, so give"
                " all images in one prefill (no prefill_chunk_size, no new images on a cached conversation)"
            )
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, -tokens:].all()):
            raise UsageError(
                "attention_mask: padding inside a continued conversation is not supported; continue rows one at a time"
            )

    def _prefill(self, call: Call, mask: Any, cache: Any) -> Prefill:
        assert call.image_index is not None
        image_index = call.image_index
        batch, tokens = image_index.shape
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UsageError(
                "attention_mask: expected [B, prompt tokens] with a recipe installed, got a ready-made mask; pass the"
                " tokenizer's mask"
            )
        if mask is not None and mask.shape[1] != tokens:
            raise UsageError(
                f"attention_mask: expected {tokens} columns, one per prompt token, got {mask.shape[1]}; pruning needs"
                " the whole prompt in one prefill (no prefill_chunk_size, no static cache)"
            )
        if cache is not None:
            if any(layer.is_compileable for layer in cache.layers):
                raise UsageError(
                    "past_key_values: a static cache cannot hold pruned layers; leave cache_implementation unset"
                )
            for layer in cache.layers:
                if isinstance(layer, RowState):
                    layer.forget_rows()
        known = prompt_columns(self)
        prompt = tokens if known is None else min(known, tokens)
        valid = torch.ones_like(image_index, dtype=torch.bool) if mask is None else mask.bool()
        start = row_start(valid)
        real = image_index.masked_fill(~valid, -1)
        real[:, prompt:] = -1
        group, keep = self._plan(real)
        text = torch.zeros_like(valid)
        text[:, :prompt] = text_queries(real[:, :prompt] >= 0, valid[:, :prompt])
        stage = Stage(
            torch.arange(tokens, device=image_index.device).expand(batch, -1),
            valid,
            group,
            text,
            torch.zeros(batch, dtype=torch.int64, device=image_index.device),
            start if bool(start.any()) else None,
        )
        outcome = Outcome(cache_lengths=[tokens] * self.family.layers)
        self.last.set(outcome)
        return Prefill(stage, keep, start.long(), tokens, prompt, ImageTokens.of(real, call.shown), outcome)

    def _plan(self, image_index: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """image [B, S] -> the sets tokens compete in, and equation (5) for each; only candidates where some set has
        more tokens than its budget."""
        if self.forced is not None:
            return image_index, {layer: torch.zeros(0) for layer in self.ratios} if bool(
                (image_index >= 0).any()
            ) else {}
        return plan_drops(self.recipe, image_index)

    def before_layer(
        self, number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        call: Call | None = kwargs.pop("quota_call", None)
        if call is None:
            return None
        if call.prefill is None:
            return self._decode(call, number, layer, args, kwargs)
        prefill, candidate = call.prefill, BEFORE if number == 0 else number
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0 and prefill.keep and kwargs.get("past_key_values") is not None:
            _rows(kwargs["past_key_values"], 0, layer).guard()
        if candidate in prefill.keep:
            hidden = self._drop(call, candidate, layer, hidden, kwargs)
        if candidate in self.ratios:
            stage = prefill.stage
            alive = torch.zeros_like(stage.valid[:, :1]).repeat(1, prefill.tokens).scatter(1, stage.index, stage.valid)
            prefill.outcome.kept[candidate] = alive[:, : prefill.prompt]
        prefill.outcome.cache_lengths[number] = hidden.shape[1]
        if prefill.pruned:
            self._align(call, number, layer, hidden, kwargs)
        if (
            number + 1 in prefill.keep
            and self.forced is None
            and self.recipe.selection_at(number + 1).score in ATTENTION_SCORES
        ):
            prefill.trace = kwargs["quota_trace"] = AttentionTrace()
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _drop(self, call: Call, candidate: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """hidden [B, n, d] -> the kept tokens' [B, n', d]; the prefill enters its next stage."""
        prefill = call.prefill
        assert prefill is not None
        stage = prefill.stage
        if self.forced is not None:
            mask = self.forced[candidate].to(hidden.device)
            chosen = mask.gather(1, stage.index.clamp_max(mask.shape[1] - 1)) | (stage.index >= mask.shape[1])
        else:
            own = hidden.shape[1] - (prefill.tokens - prefill.prompt)  # tokens of the prompt: no later one has a say
            alive = Alive(
                hidden[:, :own],
                stage.group[:, :own],
                stage.text[:, :own],
                stage.index[:, :own],
                layer,
                prefill.pictures,
                None if prefill.trace is None else prefill.trace.first(own),
                lambda: self._own_record(call, max(candidate, 0), layer, hidden, kwargs).first(own),
            )
            signals: dict[str, Tensor] = {}
            chosen = torch.zeros_like(stage.valid)
            chosen[:, :own] = choose(self.recipe, candidate, alive, prefill.keep[candidate], signals)
            prefill.trace = None
            if self.keep_signals:
                prefill.outcome.signals[candidate] = signals
        keep = stage.valid & (chosen | ~stage.visual)
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
            index,
            valid,
            group,
            text,
            stage.dropped + stage.valid.sum(-1) - counts,
            start if bool(start.any()) else None,
        )
        prefill.pruned = True
        return ops.token_gather(hidden, order)

    def _own_record(
        self, call: Call, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> AttentionTrace:
        """What the attention of layer `number` itself makes of its input, without touching the cache."""
        assert call.prefill is not None
        trace = AttentionTrace()
        inputs = {"attention_mask": kwargs["attention_mask"], "position_embeddings": kwargs["position_embeddings"]}
        if call.prefill.pruned:
            inputs = self._inputs(call, layer, hidden, kwargs)
        layer.self_attn(layer.input_layernorm(hidden), past_key_values=None, quota_trace=trace, **inputs)
        return trace

    def _align(self, call: Call, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Give a layer after a drop the rotary embedding, mask and cache layer of its own tokens."""
        prefill, cache = call.prefill, kwargs.get("past_key_values")
        assert prefill is not None
        if cache is not None:
            rows = _rows(cache, number, layer)
            rows.start, rows.dropped = prefill.stage.start, prefill.stage.dropped
            rows.removed = prefill.tokens - hidden.shape[1] if number == 0 else 0
        # position ids with gaps would be read as packed sequences, so no layer sees them
        kwargs.update(self._inputs(call, layer, hidden, kwargs), position_ids=None)

    def _inputs(self, call: Call, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Mask and rotary embedding of the stage's tokens for `layer`."""
        assert call.prefill is not None
        stage = call.prefill.stage
        if stage.rotary is None:
            stage.rotary = self._rotary(call, stage, hidden, kwargs)
        valid = None if stage.start is None else stage.valid
        if scheme_of(layer.self_attn).kv is not None:
            return {"attention_mask": valid, "position_embeddings": stage.rotary}
        if not stage.mask_made:
            stage.mask, stage.mask_made = _float_mask(call.text, hidden, valid, 0), True
        return {"attention_mask": stage.mask, "position_embeddings": stage.rotary}

    def _rotary(self, call: Call, stage: Stage, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.recipe.position_policy == "compact":
            assert call.prefill is not None
            first = _first_position(kwargs.get("position_ids"), call.prefill.first_column)
            return call.text.rotary_emb(hidden, position_ids=(first + stage.valid.long().cumsum(-1) - 1).clamp_min(0))
        cos, sin = (t.expand(len(stage.index), -1, -1) for t in kwargs["position_embeddings"])
        return ops.token_gather(cos, stage.index), ops.token_gather(sin, stage.index)

    def _decode(
        self, call: Call, number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        cache = kwargs.get("past_key_values")
        rows = cache.layers[number] if cache is not None and number < len(cache.layers) else None
        if isinstance(rows, RowState):
            rows.admit()
        if getattr(rows, "dropped", None) is None or rows is None:
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.recipe.position_policy == "compact":
            positions = kwargs.get("position_ids")
            if positions is None:  # M-RoPE without generate: the next number of this layer's own row
                started = rows.stored - (0 if rows.start is None else rows.start.long()[:, None])
                positions = started + torch.arange(hidden.shape[1], device=hidden.device)
            else:
                positions = positions - rows.dropped[:, None]
            positions = positions.expand(hidden.shape[0], -1)
            kwargs["position_embeddings"] = call.text.rotary_emb(hidden, position_ids=positions)
        mask = None
        if scheme_of(layer.self_attn).kv is None and (rows.start is not None or hidden.shape[1] > 1):
            valid = None if rows.start is None else real_columns(rows.start, rows.stored + hidden.shape[1])
            mask = _float_mask(call.text, hidden, valid, rows.stored)
        kwargs.update(attention_mask=mask, position_ids=None)
        return args, kwargs


def _rows(cache: Any, number: int, layer: Any) -> Rows:
    return pruned_layer(cache, number) if scheme_of(layer.self_attn).kv is None else kv4_layer(cache, number)


def _float_mask(text: Any, hidden: Tensor, valid: Tensor | None, stored: int) -> Any:
    """The causal mask of `hidden`'s tokens behind `stored` cached ones, in the form the model's attention backend
    wants."""
    lengths: Any = Lengths(stored)
    return create_causal_mask(
        config=text.config,
        inputs_embeds=hidden,
        attention_mask=valid,
        past_key_values=lengths,
        position_ids=None,
        layer_idx=0,
    )


def _first_position(positions: Tensor | None, first_column: Tensor) -> Tensor:
    """[B, 1]: the rotary position of each row's first real token; 0 where a model keeps only positions of several
    axes."""
    if positions is None:
        return torch.zeros_like(first_column)[:, None]
    rows = positions.expand(len(first_column), -1)
    return rows.gather(1, first_column.clamp_max(rows.shape[1] - 1)[:, None])
