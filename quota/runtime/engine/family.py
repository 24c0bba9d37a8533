"""What the engine asks of a model family, and LLaVA's answers. Everything here works on rows: tokens of any requests, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from quota import ops
from quota.arch import find_arch
from quota.core.errors import UsageError
from quota.nn.attention import QuantAttention
from quota.nn.embedding import Rotary
from quota.ops.kv4_attention import Kv
from quota.runtime.engine.prefix import digest

_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


class Family(Protocol):
    """One loaded model. M rows, hidden size d; rows come and go in the dtype of the model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_tokens: int
    image_token: int
    scaling: float

    def image_digest(self, image: Any) -> bytes:
        """16 bytes that name the picture's content, as the processor made it."""

    def image_tokens(self, image: Any) -> int:
        """Visual tokens of one picture."""

    def encode_images(self, images: Sequence[Any]) -> list[Tensor]:
        """[image_tokens, d] of each picture; a picture's features do not depend on the others."""

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [M] -> [M, d]."""

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [M] -> cos, sin float32 [M, D]."""

    def project(self, layer: int, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Kv, Kv]:
        """x [M, d] at a layer's input -> q float32 [1, H, M, D], packed keys and values [1, Hkv, M, ...]."""

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer: x [M, d] and what attention gave, float32 [M, H * D] -> [M, d]."""

    def logits(self, x: Tensor) -> Tensor:
        """x [M, d] after the last layer -> float32 [M, vocabulary]."""

    def decoder_layer(self, layer: int) -> Any:
        """The module, for token scores."""


class LlavaFamily:
    """LLaVA with a quantized language model."""

    def __init__(self, model: Any) -> None:
        arch = find_arch(model)
        if arch.name != "llava":
            raise UsageError(f"model: the engine serves LLaVA checkpoints so far, this one is {arch.name}; use `quota.load` with it")
        self.model = model
        self.text: Any = model.get_submodule(arch.text_path)
        self._layers = list(self.text.layers)
        if not all(isinstance(layer.self_attn, QuantAttention) for layer in self._layers):
            manifest = getattr(model, "quota_manifest", None)
            found = "a float one" if manifest is None else f"{manifest.regime} with parts {', '.join(manifest.modules)}"
            raise UsageError(
                f"model: the engine serves W4A4KV4 language models (4-bit cache), this one is {found}; use `quota run` or `quota.load` with it, or "
                "`quota calibrate --method flatquant` the float model"
            )
        if getattr(model, "quota_handle", None) is not None:
            raise UsageError("recipe: already installed on this model; load it without one and give the recipe to the engine")
        rope = getattr(self.text.rotary_emb, "inner", self.text.rotary_emb).rope_type
        if rope not in _FIXED_ROPE:
            raise UsageError(f"rope_type: {rope!r} changes with the length of a request; the engine needs one of {', '.join(_FIXED_ROPE)}")
        self.layers, self.heads, self.kv_heads, self.head_dim = arch.layers, arch.heads, arch.kv_heads, arch.head_dim
        self.vocabulary, self.image_token = int(self.text.embed_tokens.weight.shape[0]), arch.image_token_id
        self.max_tokens = int(model.config.text_config.max_position_embeddings)
        self.scaling = float(self._layers[0].self_attn.scaling)
        assert arch.visual_tokens is not None  # a LLaVA picture always has as many
        self._visual_tokens: int = arch.visual_tokens
        self._image_shape = (3, model.config.vision_config.image_size, model.config.vision_config.image_size)
        self._cos, self._sin = self._rotary_table()

    def _rotary_table(self) -> tuple[Tensor, Tensor]:
        embedding: Rotary = self.text.rotary_emb
        like = torch.empty(0, dtype=self.text.embed_tokens.weight.dtype)
        cos, sin = embedding(like, torch.arange(self.max_tokens)[None])
        return cos[0].float(), sin[0].float()

    def image_digest(self, image: Tensor) -> bytes:
        pixels = image.detach().float().contiguous()
        return digest(repr(tuple(pixels.shape)).encode() + pixels.numpy().tobytes())

    def image_tokens(self, image: Tensor) -> int:
        if tuple(image.shape) != self._image_shape:
            raise UsageError(f"image: expected pixels {list(self._image_shape)}, got {list(image.shape)}")
        return self._visual_tokens

    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        weight = self.text.embed_tokens.weight
        features = self.model.model.get_image_features(pixel_values=torch.stack(list(images)).to(weight.dtype), return_dict=True).pooler_output
        return [part.to(weight.dtype).clone() for part in features]

    def embed(self, ids: Tensor) -> Tensor:
        return self.text.embed_tokens(ids)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos[positions], self._sin[positions]

    def project(self, layer: int, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Kv, Kv]:
        module = self._layers[layer]
        attention: QuantAttention = module.self_attn
        qkv = attention.qkv_proj(module.input_layernorm(x).float())[None]
        keys, values = self._slots(len(x)), self._slots(len(x))
        cos, sin = (t[None] for t in rotary)
        q = ops.qkv_append(qkv, (cos, sin), (attention.q_transform, attention.k_transform), keys, values, 0, attention.clips)
        return q, keys, values

    def _slots(self, rows: int) -> Kv:
        shape = (1, self.kv_heads, rows)
        return torch.empty(*shape, self.head_dim // 2, dtype=torch.uint8), torch.empty(shape), torch.empty(shape)

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        module = self._layers[layer]
        x = x + module.self_attn.o_proj(attended).to(x.dtype)
        return x + module.mlp(module.post_attention_layernorm(x))

    def logits(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.text.norm(x)).float()

    def decoder_layer(self, layer: int) -> Any:
        return self._layers[layer]


def family_of(model: Any) -> Family:
    """The family of a loaded model; CheckpointError or UsageError for one the engine cannot serve."""
    return LlavaFamily(model)
