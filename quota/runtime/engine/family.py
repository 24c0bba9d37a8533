"""What the engine asks of a model family, and the answers of LLaVA and Qwen2.5-VL. Everything here works on rows: tokens of any requests, one below the
other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quota.core.errors import UsageError
from quota.models import find_family
from quota.models.images import Shown, shown_pictures
from quota.nn.attention import QuantAttention
from quota.nn.key_bias import QuantBiasedAttention, key_angles
from quota.ops.weights import Kv
from quota.runtime.engine.prefix import digest

_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


class Family(Protocol):
    """One loaded model. M rows, hidden size d; rows come and go in the dtype of the model.

    device: where the model is; positions and ids go there, `positions` and what `Prompt` holds stay on the host. embed, rotary,
    angles, project, finish and logits run inside captured steps, so they do not wait for it.
    axes: A, numbers that make a position: 1, or time, row and column. biased: some layers keep their key bias out of the 4-bit cache and need the
    positions of cached keys.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_tokens: int
    image_token: int
    scaling: float
    axes: int
    biased: bool
    device: torch.device

    def pictures(self, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The pictures in what the family's processor returned for one prompt, as `Prompt.images` takes them."""

    def image_digest(self, image: Any) -> bytes:
        """16 bytes that name the picture's content, as the processor made it."""

    def image_tokens(self, image: Any) -> int:
        """Visual tokens of one picture; UsageError for what is none."""

    def image_shown(self, image: Any) -> Shown:
        """What selections by content or place need to know of it."""

    def image_index(self, ids: Tensor) -> Tensor:
        """int64 [B, S] -> int64 [B, S]: the picture of its row that a visual token belongs to, -1 for text."""

    def encode_images(self, images: Sequence[Any]) -> list[Tensor]:
        """[image_tokens, d] of each picture; a picture's features do not depend on the others."""

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [M] -> [M, d]."""

    def positions(self, ids: Tensor, images: Sequence[Any]) -> np.ndarray:
        """ids int64 [S] of a prompt and its pictures -> int64 [A, S]. What follows counts on from the largest number, alike on all axes."""

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [A, M] -> cos, sin float32 [M, D]."""

    def angles(self, positions: Tensor) -> Tensor:
        """int64 [A, B, S] -> float32 [B, D, S]: cosines and sines of cached positions, the `shared` channels of `kv4_attention`."""

    def project(self, layer: int, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Kv, Kv]:
        """x [M, d] at a layer's input -> q float32 [1, H, M, D], or 2 D wide where the key bias is kept apart; packed keys and values [1, Hkv, M, ...]."""

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer: x [M, d] and what attention gave, float32 [M, H * D] -> [M, d]."""

    def logits(self, x: Tensor) -> Tensor:
        """x [M, d] after the last layer -> float32 [M, vocabulary]."""

    def decoder_layer(self, layer: int) -> Any:
        """The module, for token scores."""


class _Decoder:
    """The decoder of any family: a quantized language model whose rotary angles do not change with the length of a request."""

    axes = 1

    def __init__(self, model: Any, fixed_rope: Sequence[str]) -> None:
        arch = find_family(model)
        self.model, self.arch = model, arch
        self.text: Any = model.get_submodule(arch.text_path)
        self.device = self.text.embed_tokens.weight.device
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
        if rope not in fixed_rope:
            raise UsageError(f"rope_type: the angles of {rope!r} depend on more than a token's position; the engine needs one of {', '.join(fixed_rope)}")
        self.layers, self.heads, self.kv_heads, self.head_dim = arch.layers, arch.heads, arch.kv_heads, arch.head_dim
        self.vocabulary, self.image_token = int(self.text.embed_tokens.weight.shape[0]), arch.image_token_id
        self.max_tokens = int(model.config.text_config.max_position_embeddings)
        self.scaling = float(self._layers[0].self_attn.scaling)
        self.biased = any(isinstance(layer.self_attn, QuantBiasedAttention) for layer in self._layers)

    def _turns(self) -> tuple[Tensor, Tensor]:
        """cos, sin float32 [max_tokens, D] of positions that are one number, as the model's own embedding rounds them."""
        like = torch.empty(0, dtype=self.text.embed_tokens.weight.dtype, device=self.device)
        cos, sin = self.text.rotary_emb(like, torch.arange(self.max_tokens, device=self.device)[None])
        return cos[0].float(), sin[0].float()

    def image_index(self, ids: Tensor) -> Tensor:
        return self.arch.image_index(ids)

    def embed(self, ids: Tensor) -> Tensor:
        return self.text.embed_tokens(ids.to(self.device))

    def project(self, layer: int, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Kv, Kv]:
        module = self._layers[layer]
        attention: QuantAttention = module.self_attn
        qkv = attention.qkv_proj(module.input_layernorm(x).float())[None]
        keys, values = self._slots(len(x)), self._slots(len(x))
        cos, sin = (t[None] for t in rotary)
        return attention.append(qkv, (cos, sin), keys, values, 0), keys, values

    def _slots(self, rows: int) -> Kv:
        shape = (1, self.kv_heads, rows)
        codes = torch.empty(*shape, self.head_dim // 2, dtype=torch.uint8, device=self.device)
        return codes, torch.empty(shape, device=self.device), torch.empty(shape, device=self.device)

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        module = self._layers[layer]
        x = x + module.self_attn.o_proj(attended).to(x.dtype)
        return x + module.mlp(module.post_attention_layernorm(x))

    def logits(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.text.norm(x)).float()

    def decoder_layer(self, layer: int) -> Any:
        return self._layers[layer]


class LlavaFamily(_Decoder):
    """LLaVA: pictures are pixels [3, size, size], all of one size."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, _FIXED_ROPE)
        assert self.arch.visual_tokens is not None  # a LLaVA picture always has as many
        self._visual_tokens: int = self.arch.visual_tokens
        self._image_shape = (3, model.config.vision_config.image_size, model.config.vision_config.image_size)
        self._cos, self._sin = self._turns()

    def pictures(self, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return tuple(inputs["pixel_values"].to(self.text.embed_tokens.weight.dtype)) if "pixel_values" in inputs else ()

    def image_digest(self, image: Tensor) -> bytes:
        return digest(repr(tuple(image.shape)).encode() + _bytes(image))

    def image_tokens(self, image: Tensor) -> int:
        if tuple(image.shape) != self._image_shape:
            raise UsageError(f"image: expected pixels {list(self._image_shape)}, got {list(image.shape)}")
        return self._visual_tokens

    def image_shown(self, image: Tensor) -> Shown:
        return shown_pictures(image[None])[0]

    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        weight = self.text.embed_tokens.weight
        features = self.model.model.get_image_features(pixel_values=torch.stack(list(images)).to(weight), return_dict=True).pooler_output
        return [part.to(weight.dtype).clone() for part in features]

    def positions(self, ids: Tensor, images: Sequence[Tensor]) -> np.ndarray:
        return np.arange(len(ids))[None]

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._cos[positions[0]], self._sin[positions[0]]

    def angles(self, positions: Tensor) -> Tensor:
        flat = positions.reshape(-1)
        return key_angles(*(t[flat].view(*positions.shape[1:], -1) for t in (self._cos, self._sin)))


@dataclass(frozen=True)
class Patches:
    """A picture of dynamic resolution: pixels [h * w, patch] and its grid of patches (1, h, w)."""

    pixels: Tensor
    grid: tuple[int, int, int]


class QwenFamily(_Decoder):
    """Qwen2.5-VL: pictures of any size, M-RoPE, key biases outside the cache."""

    axes = 3

    def __init__(self, model: Any) -> None:
        super().__init__(model, ("default",))
        vision = model.config.vision_config
        self._merge, self._patch = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        # cosines and sines by channel, the axis of each channel: as MultimodalRotary shares them out
        sections = self.text.rotary_emb.inner.mrope_section
        half, ends = self.head_dim // 2, np.cumsum(sections)
        spans = [(int(end) - size, int(end), axis % 3) for axis, (end, size) in enumerate(zip(ends, sections, strict=True))]
        self._spans = [*spans, *((half + begin, half + end, axis) for begin, end, axis in spans)]
        self._table = key_angles(*(t[None] for t in self._turns()))[0].contiguous()  # [D, max_tokens]

    def pictures(self, inputs: Mapping[str, Any]) -> tuple[Patches, ...]:
        if "pixel_values" not in inputs:
            return ()
        grids = inputs["image_grid_thw"]
        parts = inputs["pixel_values"].to(self.text.embed_tokens.weight.dtype).split(grids.prod(-1).tolist())
        return tuple(Patches(part, tuple(grid)) for part, grid in zip(parts, grids.tolist(), strict=True))

    def image_digest(self, image: Patches) -> bytes:
        return digest(repr(image.grid).encode() + _bytes(image.pixels))

    def image_tokens(self, image: Patches) -> int:
        if not isinstance(image, Patches):
            raise UsageError(f"image: expected Patches, got {type(image).__name__}; make them with `Family.pictures`")
        frames, rows, columns = image.grid
        if frames != 1 or min(rows, columns) < 1 or rows % self._merge or columns % self._merge:
            raise UsageError(f"image: expected a grid (1, h, w) of multiples of {self._merge}, got {image.grid}; videos are not supported")
        if tuple(image.pixels.shape) != (rows * columns, self._patch):
            raise UsageError(f"image: expected pixels {[rows * columns, self._patch]} for grid {image.grid}, got {list(image.pixels.shape)}")
        return rows * columns // self._merge**2

    def image_shown(self, image: Patches) -> Shown:
        return shown_pictures(image.pixels, torch.tensor([image.grid]), self._merge)[0]

    def encode_images(self, images: Sequence[Patches]) -> list[Tensor]:
        weight = self.text.embed_tokens.weight
        features = []
        for image in images:  # a float tower's sums may depend on what else is in a call
            grid = torch.tensor([image.grid], device=self.device)
            found = self.model.model.get_image_features(pixel_values=image.pixels.to(weight), image_grid_thw=grid, return_dict=True)
            features.append(found.pooler_output[0].to(weight.dtype).clone())
        return features

    def positions(self, ids: Tensor, images: Sequence[Patches]) -> np.ndarray:
        grids = torch.tensor([image.grid for image in images]) if images else None
        kinds = (ids == self.image_token).int()[None]
        found = self.model.model.get_rope_index(input_ids=ids[None], mm_token_type_ids=kinds, image_grid_thw=grids)[0]
        return found[:, 0].long().numpy()

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.angles(positions[:, None])[0].T.chunk(2, -1)
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    def angles(self, positions: Tensor) -> Tensor:
        _, batch, slots = positions.shape
        out = torch.empty(batch, self.head_dim, slots, device=self.device)
        for begin, end, axis in self._spans:
            out[:, begin:end] = self._table[begin:end].index_select(1, positions[axis].reshape(-1)).view(end - begin, batch, slots).transpose(0, 1)
        return out


def _bytes(pixels: Tensor) -> bytes:
    return pixels.detach().float().contiguous().numpy().tobytes()


_FAMILIES: dict[str, type[LlavaFamily] | type[QwenFamily]] = {"llava": LlavaFamily, "qwen2_5_vl": QwenFamily}


def family_of(model: Any) -> Family:
    """The family of a loaded model; CheckpointError or UsageError for one the engine cannot serve."""
    return _FAMILIES[find_family(model).name](model)
