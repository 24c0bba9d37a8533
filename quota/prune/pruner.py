"""Pruning visual tokens between decoder layers with forward pre-hooks; the model's own forwards stay as they are.

At the input of each candidate layer the recipe's selection chooses among the visual tokens alive, and only the kept
ones go on. Tokens are dropped at prefill only.

Candidate 0 chooses among the merged embeddings. Layer 0's cache then holds the kept tokens and still reports the whole
prompt's length, by which `generate` and the text model count positions.

Positions. "original": kept tokens keep the prompt's rotary positions and decoding continues the unpruned counter.
"compact": inside each layer the alive tokens are renumbered without gaps from the row's first position, and decoding at
a layer continues from that layer's own last number; what a layer cached and what it computes later therefore always use
one numbering. Under M-RoPE "original" keeps a token's three positions together; "compact" gives the alive tokens one
consecutive number for all three, so the image's layout is no longer in them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quota.core.errors import UsageError
from quota.core.formats import scheme_of
from quota.models import find_family, submodule
from quota.prune.hooks import Hooks
from quota.prune.recording import start_recording, stop_recording

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


class Encoding:
    """Stands for a model's `get_image_features` while a recipe is installed: upstream's, whose result says which images
    it is of. `generate` encodes images before its first forward and hands the features on alone."""

    def __init__(self, base: Any, hooks: Hooks) -> None:
        self.base, self.hooks, self.__wrapped__ = base, hooks, base.get_image_features
        self._own = base.__dict__.get("get_image_features")
        self._names = list(inspect.signature(self.__wrapped__).parameters)
        base.get_image_features = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("quota_call", None)
        found = self.__wrapped__(*args, **kwargs)
        if not isinstance(found, tuple):
            given = dict(zip(self._names, args, strict=False))
            found.quota_seen = self.hooks.seen({**given, **kwargs}, self.base)
        return found

    def remove(self) -> None:
        """Give the model its own back. Calling it twice is harmless."""
        if self.base.__dict__.get("get_image_features") is self:
            del self.base.get_image_features
            if self._own is not None:
                self.base.get_image_features = self._own


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
        if any(isinstance(getattr(hook, "__self__", None), Hooks) for hook in self.text._forward_pre_hooks.values()):
            raise UsageError("recipe: one is already installed on this model; undo it first")
        self.hooks = hooks = Hooks(family, recipe, forced)
        layers: Any = self.text.layers
        base: Any = submodule(model, family.model_path)
        self._base = (
            start_recording(self.text) if any(scheme_of(layer.self_attn).kv is None for layer in layers) else None
        )
        self._handles: list[Any] = [
            model.register_forward_pre_hook(hooks.before_model, with_kwargs=True),
            base.register_forward_pre_hook(hooks.before_merge, with_kwargs=True),
            self.text.register_forward_pre_hook(hooks.before_text, with_kwargs=True),
            self.text.register_forward_hook(hooks.after_text, with_kwargs=True),
        ]
        self._encoding = Encoding(base, hooks)
        for number, layer in enumerate(layers):
            self._handles.append(layer.register_forward_pre_hook(partial(hooks.before_layer, number), with_kwargs=True))

    @property
    def kept(self) -> dict[int, Tensor]:
        return self.hooks.last.value.kept

    @property
    def signals(self) -> dict[int, dict[str, Tensor]]:
        return self.hooks.last.value.signals

    @property
    def cache_lengths(self) -> list[int]:
        return self.hooks.last.value.cache_lengths

    @property
    def keep_signals(self) -> bool:
        return self.hooks.keep_signals

    @keep_signals.setter
    def keep_signals(self, keep: bool) -> None:
        self.hooks.keep_signals = keep

    def remove(self) -> None:
        """Undo the installation. Calling it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._encoding.remove()
        if self._base is not None:
            stop_recording(self.text, self._base)
            self._base = None
