"""What runs before and after the modules of a pruned model; the model's own forwards stay as they are.

At the input of each candidate layer the recipe's selection chooses among the visual tokens alive, and only the kept
ones go on: hidden states, rotary positions, masks and the layer caches all follow (`quota.prune.stages`). Tokens are
dropped at prefill only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quota.core.errors import UsageError
from quota.core.formats import scheme_of
from quota.models import Family
from quota.models.images import ImageIndex, ImageInput, ImageTokens
from quota.nn.attention import AttentionTrace
from quota.nn.cache import RowState
from quota.nn.padding import real_columns, row_start
from quota.prune.alive import Alive
from quota.prune.attention import text_queries
from quota.prune.budget import plan_drops
from quota.prune.call import (
    Call,
    LastOutcome,
    Mark,
    Outcome,
    Prefill,
    Seen,
    Stage,
    ahead_of,
    continued_positions,
    prompt_columns,
)
from quota.prune.select import choose, needs_attention, needs_images
from quota.prune.stages import advance, align, float_mask, own_trace, raised, rows_of

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


class Hooks:
    """The hooks of one recipe. They know no module and keep nothing of a call but its outcome, so a submodule may be
    deep-copied with its hooks."""

    def __init__(self, family: Family, recipe: Recipe, forced: Mapping[int, Tensor] | None = None) -> None:
        self.family, self.recipe, self.forced = family, recipe, forced
        self.ratios = dict(zip(recipe.candidates, recipe.keep, strict=True))
        self.needs_images = forced is None and needs_images(recipe)
        self.keep_signals = False
        self.last = LastOutcome()

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        copy = memo[id(self)] = Hooks(self.family, self.recipe, self.forced)
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
        features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        seen: Seen | None = getattr(features, "quota_seen", None)
        if seen is None and features is not None and self.family.newline_path is not None:
            raise UsageError(
                "mm_encoder_outputs: expected features that this model's get_image_features made under the recipe, got"
                " others, whose sizes nothing tells; pass pixel_values"
            )
        if kwargs.get("pixel_values") is not None:
            seen = self.seen({**kwargs, "input_ids": ids}, module)
        shown = None if seen is None else seen.shown
        call = Call(self._index(ids, seen), shown, padding=kwargs.get("attention_mask"))
        return args, {**kwargs, "quota_call": call, **self._positions(ids, kwargs)}

    def seen(self, inputs: Mapping[str, Any], module: Any) -> Seen:
        """What the images in the inputs of `module` are, pixels as it reads them."""
        images = self.family.images(inputs)
        if not self.needs_images:
            return Seen([image.grid for image in images], None)
        dtype = module.get_input_embeddings().weight.dtype
        read = [ImageInput(image.pixels.to(dtype), image.grid) for image in images]
        return Seen([image.grid for image in read], [raster for image in read for raster in self.family.shown(image)])

    def _index(self, ids: Tensor | None, seen: Seen | None = None) -> ImageIndex | None:
        """Tokens behind the prompt that `generate` was given hold no image."""
        if ids is None:
            return None
        known = prompt_columns(self)
        own = self.family.image_index(ids[:, :known], [] if seen is None else seen.grids)
        return ImageIndex(*(pad(part, (0, ids.shape[1] - part.shape[1]), value=-1) for part in own))

    def before_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        embeds, mask, cache = kwargs.get("inputs_embeds"), kwargs.get("attention_mask"), kwargs.get("past_key_values")
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = ids if embeds is None else embeds
        if given is None:
            return None  # upstream says what is missing
        kwargs = dict(kwargs)
        planes = self.family.take_planes(kwargs)
        call: Call = kwargs.get("quota_call") or Call(self._index(ids))
        call.text = module
        mask = call.padding if self.family.prefix and "quota_call" in kwargs else mask
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
                self._check_continuation(call.index, mask, cached, tokens)
        elif call.index is None:
            raise UsageError(
                "input_ids: expected token ids, got embeddings only; pruning must know which tokens are visual"
            )
        else:
            call.prefill = self._prefill(call, mask, cache)
            call.prefill.planes = planes
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

    def _check_continuation(self, index: ImageIndex | None, mask: Any, cached: int, tokens: int) -> None:
        known = prompt_columns(self)
        own = tokens if known is None else max(known - cached, 0)  # behind them: what `generate` drafted
        if index is not None and bool((index.image[:, :own] >= 0).any()):
            raise UsageError(
                "past_key_values: image tokens arrived after cached ones; pruning ranks a whole prompt at once, so give"
                " all images in one prefill (no prefill_chunk_size, no new images on a cached conversation)"
            )
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, -tokens:].all()):
            raise UsageError(
                "attention_mask: padding inside a continued conversation is not supported; continue rows one at a time"
            )

    def _prefill(self, call: Call, mask: Any, cache: Any) -> Prefill:
        assert call.index is not None
        index = call.index
        batch, tokens = index.image.shape
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
        valid = torch.ones_like(index.image, dtype=torch.bool) if mask is None else mask.bool()
        start = row_start(valid)
        asked = valid.clone()
        asked[:, prompt:] = False
        real = index.where(asked)
        group, keep = self._plan(real)
        text = torch.zeros_like(valid)
        text[:, :prompt] = text_queries(real.image[:, :prompt] >= 0, valid[:, :prompt])
        stage = Stage(
            torch.arange(tokens, device=valid.device).expand(batch, -1),
            valid,
            group,
            text,
            torch.zeros(batch, dtype=torch.int64, device=valid.device),
            start if bool(start.any()) else None,
        )
        outcome = Outcome(cache_lengths=[tokens] * self.family.layers)
        self.last.set(outcome)
        images, first = ImageTokens.of(real.tile, call.shown), start.long()
        return Prefill(stage, keep, first, tokens, prompt, images, outcome, prefix=self.family.prefix)

    def _plan(self, index: ImageIndex) -> tuple[Tensor, dict[int, Tensor]]:
        """The sets tokens compete in, and equation (5) for each; only candidates where some set has more tokens than
        its budget."""
        if self.forced is not None:
            return index.tile, {layer: torch.zeros(0) for layer in self.ratios} if bool(index.visual.any()) else {}
        return plan_drops(self.recipe, index)

    def before_layer(
        self, number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        call: Call | None = kwargs.pop("quota_call", None)
        if call is None:
            return None
        if call.prefill is None:
            return self._decode(call, number, layer, args, kwargs)
        prefill = call.prefill
        hidden = args[0] if args else kwargs["hidden_states"]
        if number:
            hidden = raised(prefill, hidden)
        if number == 0 and prefill.keep and kwargs.get("past_key_values") is not None:
            rows_of(kwargs["past_key_values"], 0, layer).guard()
        if number in prefill.keep:
            hidden = self._drop(call, number, layer, hidden, kwargs)
        if number in self.ratios:
            stage = prefill.stage
            alive = torch.zeros_like(stage.valid[:, :1]).repeat(1, prefill.tokens).scatter(1, stage.index, stage.valid)
            prefill.outcome.kept[number] = alive[:, : prefill.prompt]
        prefill.outcome.cache_lengths[number] = hidden.shape[1]
        if prefill.pruned:
            align(self.recipe, call, number, layer, hidden, kwargs)
        if number + 1 in prefill.keep and self.forced is None and needs_attention(self.recipe, number + 1):
            prefill.trace = kwargs["quota_trace"] = AttentionTrace()
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _drop(self, call: Call, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """hidden [B, n, d] -> the tokens [B, n', d] that go on into layer `number`; the prefill enters its next
        stage."""
        prefill = call.prefill
        assert prefill is not None
        stage = prefill.stage
        if self.forced is not None:
            mask = self.forced[number].to(hidden.device)
            chosen = mask.gather(1, stage.index.clamp_max(mask.shape[1] - 1)) | (stage.index >= mask.shape[1])
        else:
            own = hidden.shape[1] - (prefill.tokens - prefill.prompt)  # tokens of the prompt: later ones do not count
            alive = Alive(
                hidden[:, :own],
                stage.group[:, :own],
                stage.text[:, :own],
                stage.index[:, :own],
                layer,
                prefill.images,
                None if prefill.trace is None else prefill.trace.first(own),
                lambda: own_trace(self.recipe, call, layer, hidden, kwargs).first(own),
            )
            chosen = torch.zeros_like(stage.valid)
            chosen[:, :own] = choose(self.recipe, number, alive, prefill.keep[number])
            prefill.trace = None
            if self.keep_signals:
                prefill.outcome.signals[number] = alive.signals
        return advance(prefill, stage.valid & (chosen | ~stage.visual), hidden)

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
            mask = float_mask(call.text, hidden, valid, rows.stored)
        kwargs.update(attention_mask=mask, position_ids=None)
        return args, kwargs
