"""Running any LLaVA model under a recipe, and taking the recipe off again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quota.core.errors import RecipeError, UsageError
from quota.models import find_family, model_fingerprint
from quota.prune.call import continued_positions, generating
from quota.prune.pruner import Pruner

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


_REFUSED = {
    "prefill_chunk_size": "pruning ranks a whole prompt at once",
    "assistant_early_exit": "the draft would take layers away while the recipe counts on them; pass an assistant_model",
    "token_healing": "the prompt that was ranked would change afterwards",
}


class PatchHandle:
    """An installed recipe. A context manager; `undo()` (or leaving the block) restores the model exactly.

    State belongs to the call: threads may call the model at once, and `kept` and `cache_lengths` are those of the
    thread that asks. A deep copy of the model has the recipe installed for itself and a handle of its own,
    `quota_handle`; pickling it is a UsageError.
    """

    def __init__(self, model: Any, recipe: Recipe, forced: Mapping[int, Tensor] | None = None) -> None:
        self.model, self.recipe = model, recipe
        self.pruner = Pruner(model, recipe, forced)
        model.quota_handle = self
        self._own_generate = model.__dict__.get("generate")
        model.generate = self._generate

    @property
    def kept(self) -> dict[int, Tensor]:
        """This thread's last prefill: candidate layer -> bool [B, prompt tokens], True for tokens (text included)
        alive from that layer on."""
        return self.pruner.kept

    @property
    def cache_lengths(self) -> list[int]:
        """This thread's last prefill: tokens each decoder layer ran on and cached (the longest row of the batch)."""
        return self.pruner.cache_lengths

    @property
    def installed(self) -> bool:
        return getattr(self.model, "quota_handle", None) is self

    def undo(self) -> None:
        """Take the recipe off. Calling it twice is harmless."""
        if not self.installed:
            return
        self.pruner.remove()
        del self.model.quota_handle
        if self._own_generate is None:
            del self.model.generate
        else:
            self.model.generate = self._own_generate

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` while the recipe is installed. UsageError for what would choose other tokens than one
        prefill of the prompt does."""
        model = self.model
        for name, reason in _REFUSED.items():
            if self._setting(name, kwargs):
                raise UsageError(f"{name}: {reason}; leave it unset")
        implementation = self._setting("cache_implementation", kwargs)
        if implementation not in (None, "dynamic"):
            raise UsageError(
                f"cache_implementation: expected none or 'dynamic' with a recipe installed, got {implementation!r}"
            )
        if kwargs.get("inputs_embeds") is not None:
            raise UsageError("inputs_embeds: expected input_ids alone; pruning must know which tokens are visual")
        ids, mask, cache = (
            kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None)),
            kwargs.get("attention_mask"),
            kwargs.get("past_key_values"),
        )
        prompt = None if ids is None else max(ids.shape[1], 0 if mask is None else mask.shape[-1])
        if cache is not None and cache.get_seq_length() and ids is not None:
            if self._drafts(kwargs):
                raise UsageError(
                    "past_key_values: drafted decoding starts from an empty cache (transformers feeds it the whole"
                    " prompt); leave it unset"
                )
            mark = self.pruner.hooks.mark_of(cache)
            if self.pruner.hooks.family.axes > 1 and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = continued_positions(mark.ahead, len(ids), 0, prompt or 0, ids.device)
        with generating(self.pruner.hooks, prompt):
            return (
                type(model).generate(model, *args, **kwargs)
                if self._own_generate is None
                else self._own_generate(*args, **kwargs)
            )

    def _setting(self, name: str, kwargs: Mapping[str, Any]) -> Any:
        """As `generate` resolves it: from its arguments, the configuration given, or the model's own."""
        places = (
            getattr(kwargs.get("generation_config"), name, None),
            getattr(self.model.generation_config, name, None),
        )
        return kwargs[name] if name in kwargs else next((value for value in places if value is not None), None)

    def _drafts(self, kwargs: Mapping[str, Any]) -> bool:
        return (
            kwargs.get("assistant_model") is not None or self._setting("prompt_lookup_num_tokens", kwargs) is not None
        )

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patched(model: Any, recipe: Recipe | str | Path, *, forced: Mapping[int, Tensor] | None = None) -> PatchHandle:
    """Install `recipe` (a Recipe or a file) on a supported model, float or quantized; `with patched(model, recipe) as
    handle:` undoes it.

    Threads may share the patched model: what a call chooses travels with the call. Assisted and prompt-lookup decoding,
    beams, several returned sequences and `use_cache=False` keep the tokens that plain decoding keeps; a chat goes on
    with the cache its own turns filled. What cannot (chunked prefill, static, quantized and offloaded caches, a cache
    of another model or recipe, embeddings without ids, labels, gradient checkpointing) is a UsageError.

    forced: candidate layer -> bool [B, prompt tokens] replaces the scored choice. CheckpointError for another
    architecture, RecipeError when the recipe belongs to another model, UsageError when a recipe is already installed.
    """
    from quota.core.recipe import Recipe  # reads and checks documents: needed only with a recipe

    family = find_family(model)
    if getattr(model, "quota_handle", None) is not None:
        raise UsageError("recipe: one is already installed on this model; call model.quota_handle.undo() first")
    if isinstance(recipe, (str, Path)):
        recipe = Recipe.load(recipe)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe: expected a Recipe or a path, got {type(recipe).__name__}")
    recipe.check_model(model_fingerprint(model), family.layers, family.model_class)
    if forced is not None and (missing := sorted(set(recipe.candidates) - set(forced))):
        raise UsageError(f"forced: expected a mask for every candidate layer, missing {missing}")
    return PatchHandle(model, recipe, forced)
