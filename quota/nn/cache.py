"""Key/value caches: layers of the formats a scheme stores (`quota.nn.kv`), and float layers that remember what was
pruned before them.

Layers of one cache may hold different numbers of tokens: pruning before decoder layer l leaves layer l's cache with
exactly the tokens alive there (`stored`). `generate` counts the prompt by layer 0's `get_seq_length()`: where tokens
were dropped before layer 0, that layer adds the removed columns to what it reports, so prompts are still counted whole.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from quota import ops
from quota.core.errors import UsageError
from quota.core.formats import KV4, KV16
from quota.nn.kv import KINDS, Halves, KvKind, Stored

_GROWTH_TOKENS = 64


class RowState:
    """Facts about each row of a cache layer, moved with the batch: `start` [B] int32 (first real slot; None = all rows
    start at 0) and
    `dropped` [B] int64 (tokens pruned before this layer; None = the layer was never pruned). `removed`: prompt columns
    that layer 0
    never saw, the same for all rows; 0 in every other layer. `guarded`: layer 0 of a pruned prompt takes tokens only of
    a call that the recipe's hooks let in, for without them positions and masks would be those of the whole prompt."""

    start: Tensor | None = None
    dropped: Tensor | None = None
    removed: int = 0
    guarded: bool = False
    admitted: bool = False

    def guard(self) -> None:
        self.guarded = self.admitted = True

    def admit(self) -> None:
        """Let the next tokens in."""
        self.admitted = True

    def check_admitted(self) -> None:
        """UsageError where no admission of the next tokens precedes it."""
        if self.guarded and not self.admitted:
            raise UsageError(
                "past_key_values: the cache holds a pruned prompt and no recipe is installed now; install the recipe"
                " again to go on with it"
            )

    def move_rows(self, move: Callable[[Tensor], Tensor]) -> None:
        self.start = None if self.start is None else move(self.start)
        self.dropped = None if self.dropped is None else move(self.dropped)

    def forget_rows(self) -> None:
        self.start = self.dropped = None
        self.removed, self.guarded = 0, False


class Rows(Protocol):
    """What the pruner needs of a cache layer."""

    start: Tensor | None
    dropped: Tensor | None
    removed: int

    @property
    def stored(self) -> int: ...

    def guard(self) -> None: ...


class KvLayer(RowState, CacheLayerMixin):
    """Keys and values of one decoder layer, as a kind stores them.

    Buffers grow by copying: `buffers` holds each field of keys, `k_q`, and of values, `v_q`, [B, Hkv, C, ...]; the
    first `length` of C slots are filled. `keys` and `values` stay None: there is no float copy.
    """

    is_sliding, is_compileable, is_croppable, supports_early_init = False, False, True, False
    kind: ClassVar[KvKind]

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[str, Tensor] = {}
        self.length = 0

    @property
    def key(self) -> Stored:
        """All C slots."""
        return self._stored("k")

    @property
    def value(self) -> Stored:
        """As `key`."""
        return self._stored("v")

    def _stored(self, which: str) -> Stored:
        return tuple([self.buffers[f"{which}_{field}"] for field in self.kind.fields])

    @property
    def nbytes(self) -> int:
        """Bytes of the filled slots."""
        return sum(t[:, :, : self.length].numel() * t.element_size() for t in self.buffers.values())

    def grow(self, batch: int, heads: int, tokens: int, dim: int, like: Tensor) -> int:
        """Make room for `tokens` more slots, which the caller fills; returns the first one. `like`: a tensor of the
        model's dtype and device."""
        self.check_admitted()
        self.admitted = False
        if not self.is_initialized:
            self._initialize(batch, heads, dim, like)
        held = len(self.key[0])
        if batch != held:
            raise UsageError(f"past_key_values: holds a batch of {held}, got {batch} rows; start from an empty cache")
        self._reserve(self.length + tokens)
        position, self.length = self.length, self.length + tokens
        return position

    @property
    def filled_key(self) -> Stored:
        """As `key`, the filled slots."""
        return tuple(t[:, :, : self.length] for t in self.key)

    def dequantize_keys(self) -> Tensor:
        """[B, Hkv, length, D] float32."""
        return self.kind.floats(self.filled_key)

    def dequantize_values(self) -> Tensor:
        """[B, Hkv, length, D] float32."""
        return self.kind.floats(tuple(t[:, :, : self.length] for t in self.value))

    def _reserve(self, tokens: int) -> None:
        capacity = self.key[0].shape[2]
        if tokens <= capacity:
            return
        capacity = -(-max(tokens, capacity + capacity // 2) // _GROWTH_TOKENS) * _GROWTH_TOKENS
        for name, old in self.buffers.items():
            new = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : self.length] = old[:, :, : self.length]
            self.buffers[name] = new

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        self._initialize(batch, heads, dim, key_states)

    def _initialize(self, batch: int, heads: int, dim: int, like: Tensor) -> None:
        self.dtype, self.device = like.dtype, like.device
        for which in "kv":
            try:
                made = self.kind.empty(batch, heads, 0, dim, like.device)
            except ValueError as error:
                raise UsageError(str(error)) from None
            self.buffers.update({f"{which}_{field}": t for field, t in zip(self.kind.fields, made, strict=True)})
        self.is_initialized = True

    @abstractmethod
    def append(self, key: Tensor, value: Tensor) -> None:
        """key, value [B, Hkv, T, D] float32: store them in the next T slots."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append and return everything dequantized, for attention code that wants tensors."""
        self.append(key_states.float(), value_states.float())
        return self.dequantize_keys().to(key_states.dtype), self.dequantize_values().to(value_states.dtype)

    @property
    def stored(self) -> int:
        return self.length

    def get_seq_length(self) -> int:
        return self.length + self.removed if self.length else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.buffers, self.length, self.is_initialized = {}, 0, False
        self.forget_rows()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (a number <= 0, as upstream)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected a number of tokens <= 0, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)
        if not self.length:
            self.forget_rows()

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        self.buffers = {name: move(t).contiguous() for name, t in self.buffers.items()}
        self.move_rows(move)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._move(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._move(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(lambda t: t[indices])

    def offload(self) -> None:
        self._move(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._move(lambda t: t.to(self.device, non_blocking=True))


class Kv4Layer(KvLayer):
    """Asymmetric 4-bit keys and values, one (scale, zero) per token and kv head: codes `q` [B, Hkv, C, D/2] uint8,
    `scale` and `zero` [B, Hkv, C] float32."""

    kind = KINDS[KV4]

    def append(self, key: Tensor, value: Tensor, key_clip: float = 1.0, value_clip: float = 1.0) -> None:
        batch, heads, tokens, dim = key.shape
        position = self.grow(batch, heads, tokens, dim, key)
        ops.kv4_append(*self.key, key.contiguous(), position, key_clip)
        ops.kv4_append(*self.value, value.contiguous(), position, value_clip)


class Kv16Layer(KvLayer):
    """float16 keys and values `x` [B, Hkv, C, D]."""

    kind = KINDS[KV16]

    def append(self, key: Tensor, value: Tensor) -> None:
        batch, heads, tokens, dim = key.shape
        position = self.grow(batch, heads, tokens, dim, key)
        for (cache,), new in ((self.key, key), (self.value, value)):
            Halves.put(cache, new, position)


LAYERS: dict[KvKind, type[KvLayer]] = {layer.kind: layer for layer in (Kv4Layer, Kv16Layer)}


class PrunedLayer(RowState, DynamicLayer):
    """A float cache layer that remembers its row starts and how many tokens were pruned before it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_admitted()
        self.admitted = False
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def stored(self) -> int:
        return super().get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if not self.stored:
            self.forget_rows()

    def get_seq_length(self) -> int:
        return self.stored + self.removed if self.stored else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.stored + query_length, 0

    def reset(self) -> None:
        self.keys = self.values = None  # transformers before 5.21 would zero the tokens but keep their number
        self.is_initialized = False
        super().reset()
        self.forget_rows()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.move_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.move_rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.move_rows(lambda t: t[indices])


class KvCache(DynamicCache):
    """A cache of `KvLayer`s. Made for you: a quantized model turns the empty cache that `generate` creates into one."""

    def __init__(self, layers: int, kind: KvKind = Kv4Layer.kind) -> None:
        Cache.__init__(self, layers=[LAYERS[kind]() for _ in range(layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of all stored keys and values; layers that stayed float are counted as they are."""
        return sum(kv_bytes(self))


def stored_tokens(cache: Cache) -> list[int]:
    """Tokens in use per decoder layer."""
    layers: list[Any] = cache.layers
    return [
        layer.stored if isinstance(layer, (KvLayer, PrunedLayer)) else int(layer.get_seq_length()) for layer in layers
    ]


def kv_bytes(cache: Cache) -> list[int]:
    """Bytes in use per decoder layer, as stored."""
    return [layer.nbytes if isinstance(layer, KvLayer) else _float_bytes(layer) for layer in cache.layers]


def _float_bytes(layer: Any) -> int:
    return sum(t.numel() * t.element_size() for t in (layer.keys, layer.values) if t is not None)


def kv_layer(cache: Cache, index: int, kind: KvKind = Kv4Layer.kind) -> KvLayer:
    """Layer `index` of `cache` as a layer of a kind; an empty float layer is replaced, a filled or fixed-size one is a
    UsageError."""
    layer: KvLayer = _own_layer(cache, index, LAYERS[kind])
    if type(cache) is DynamicCache:
        cache.__class__ = KvCache  # same fields; adds the account of bytes
    return layer


def pruned_layer(cache: Cache, index: int) -> PrunedLayer:
    """Layer `index` of `cache` as a float layer with row state, under the same conditions as `kv_layer`."""
    layer: PrunedLayer = _own_layer(cache, index, PrunedLayer)
    return layer


def _own_layer(cache: Any, index: int, kind: Any) -> Any:
    while len(cache.layers) <= index and getattr(cache, "layer_class_to_replicate", None) is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, kind):
        return layer
    if getattr(cache, "offloading", False) or type(layer) not in (DynamicLayer, PrunedLayer, *LAYERS.values()):
        found = "an offloaded" if getattr(cache, "offloading", False) else f"a {type(layer).__name__}"
        raise UsageError(
            f"past_key_values: expected a growing cache (DynamicCache), got {found} one; leave cache_implementation"
            " unset"
        )
    if layer.get_seq_length():
        raise UsageError(
            f"past_key_values: layer {index} already holds {layer.get_seq_length()} tokens of another model; start from"
            " an empty cache"
        )
    cache.layers[index] = kind()
    return cache.layers[index]
