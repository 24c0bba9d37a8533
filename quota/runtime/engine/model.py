"""The loaded model as the engine runs it. Everything here works on rows: tokens of any requests, one below the
other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quota.core.errors import UsageError
from quota.core.formats import DEFAULT, FLOAT
from quota.models import find_family
from quota.models.images import ImageIndex, ImageInfo, ImageInput
from quota.models.quantize import model_scheme, quantized_modules, text_scheme
from quota.nn.attention import QuantAttention
from quota.nn.key_bias import QuantBiasedAttention, key_angles
from quota.nn.kv import Stored
from quota.runtime.engine.kv_storage import block_bytes
from quota.runtime.engine.prefix import digest
from quota.runtime.engine.request import Prompt


class EngineModel:
    """One loaded model. M rows, hidden size d; rows come and go in the dtype of the model.

    device: where the model is; positions and ids go there, `positions` and what `Prompt` holds stay on the host. embed,
    rotary, angles, project, finish and logits run inside captured steps, so they do not wait for it. axes: A, numbers
    that make a position: 1, or time, row and column. biased: some layers keep their key bias out of the 4-bit cache and
    need the positions of cached keys. kv: how keys and values are stored. UsageError for a model the engine cannot
    serve.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.family = model, find_family(model)
        family = self.family
        self.text: Any = model.get_submodule(family.text_path)
        self.device = self.text.embed_tokens.weight.device
        self._layers = list(self.text.layers)
        self.scheme = text_scheme(model)
        if self.scheme is FLOAT:
            raise UsageError(_refusal(model))
        if getattr(model, "quota_handle", None) is not None:
            raise UsageError(
                "recipe: already installed on this model; load it without one and give the recipe to the engine"
            )
        rope = getattr(self.text.rotary_emb, "inner", self.text.rotary_emb).rope_type
        if rope not in family.fixed_rope:
            known = ", ".join(family.fixed_rope)
            raise UsageError(
                f"rope_type: the angles of {rope!r} depend on more than a token's position; the engine needs one of"
                f" {known}"
            )
        self.layers, self.heads, self.kv_heads, self.head_dim = (
            family.layers,
            family.heads,
            family.kv_heads,
            family.head_dim,
        )
        self.axes, self.width = family.axes, family.hidden_size
        self.vocabulary, self.image_token = int(self.text.embed_tokens.weight.shape[0]), family.image_token_id
        self.max_tokens = int(model.config.text_config.max_position_embeddings)
        self.scaling, self.kv = float(self._layers[0].self_attn.scaling), self._layers[0].self_attn.kv
        self.biased = any(isinstance(layer.self_attn, QuantBiasedAttention) for layer in self._layers)
        self._cos, self._sin = self._turns()
        if (
            self.axes > 1
        ):  # channels that turn with each axis, of a table [D, max_tokens]: halves are cosines and sines of one angle
            table = key_angles(self._cos[None], self._sin[None])[0]
            spans = family.rotary_axes(self.text.rotary_emb)
            self._tables = []
            for axis in range(self.axes):
                own = [channel for begin, end, turned in spans if turned == axis for channel in range(begin, end)]
                channels = torch.tensor(own, device=self.device)
                self._tables.append((channels, table[channels]))

    def _turns(self) -> tuple[Tensor, Tensor]:
        """cos, sin float32 [positions, D] of positions that are one number, as the model's own embedding rounds
        them."""
        like = torch.empty(0, dtype=self.text.embed_tokens.weight.dtype, device=self.device)
        positions = torch.arange(self.max_tokens + self.family.first_position, device=self.device)
        cos, sin = self.text.rotary_emb(like, positions[None])
        return cos[0].float(), sin[0].float()

    def images(self, inputs: Mapping[str, Any]) -> tuple[ImageInput, ...]:
        """The images in what the processor returned for one prompt, as `Prompt.images` takes them."""
        dtype = self.text.embed_tokens.weight.dtype
        return tuple(ImageInput(image.pixels.to(dtype), image.grid) for image in self.family.images(inputs))

    def image_digest(self, image: ImageInput) -> bytes:
        """16 bytes that name the image's content, as the processor made it."""
        name = tuple(image.pixels.shape) if image.grid is None else image.grid
        return digest(repr(name).encode() + image.pixels.detach().float().contiguous().numpy().tobytes())

    def image_tokens(self, image: ImageInput) -> int:
        """Tokens of one image; UsageError for what is none."""
        if not isinstance(image, ImageInput):
            raise UsageError(
                f"image: expected ImageInput, got {type(image).__name__}; make them with `EngineModel.images`"
            )
        return self.family.image_tokens(image)

    def image_shown(self, image: ImageInput) -> list[ImageInfo]:
        """What selections by content or position read of it, a raster each."""
        return self.family.shown(image)

    def image_index(self, prompt: Prompt) -> ImageIndex:
        """Where the images of a prompt stand, [1, S]."""
        return self.family.image_index(torch.as_tensor(prompt.ids)[None], [image.grid for image in prompt.images])

    def encode_images(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """[image_tokens, (1 + planes) * d] of each image; an image's features do not depend on the others."""
        return self.family.encode(self.model, images)

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [M] -> [M, d]."""
        return self.text.embed_tokens(ids.to(self.device))

    def with_planes(self, x: Tensor) -> Tensor:
        """x [M, d] of text -> [M, (1 + planes) * d], a row as it goes into the first layer of a prefill."""
        return torch.nn.functional.pad(x, (0, len(self.family.taps) * self.width)) if self.family.taps else x

    def raised(self, x: Tensor, planes: Tensor) -> Tensor:
        """x [M, d] out of a layer and planes [M, n * d] still to be added -> with the first of them, before the rest;
        x where there are none."""
        if not planes.shape[-1]:
            return x
        return torch.cat([x + planes[:, : self.width], planes[:, self.width :]], -1)

    def positions(self, ids: Tensor, images: Sequence[ImageInput]) -> np.ndarray:
        """ids int64 [S] of a prompt and its images -> int64 [A, S]. Positions after the prompt count on from
        the largest one, equal on all axes."""
        return self.family.positions(
            self.model, ids, [image.grid for image in images if image.grid is not None]
        ).numpy()

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [A, M] -> cos, sin float32 [M, D]."""
        if self.axes == 1:
            return self._cos[positions[0]], self._sin[positions[0]]
        cos, sin = self.angles(positions[:, None])[0].T.chunk(2, -1)
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    def angles(self, positions: Tensor) -> Tensor:
        """int64 [A, B, S] -> float32 [B, D, S]: cosines and sines of cached positions, the `shared` channels of
        `kv4_attention`."""
        _, batch, slots = positions.shape
        if self.axes == 1:
            flat = positions.reshape(-1)
            return key_angles(*(t[flat].view(batch, slots, -1) for t in (self._cos, self._sin)))
        out = torch.empty(batch, self.head_dim, slots, device=self.device)
        for axis, (channels, table) in enumerate(self._tables):
            turned = table.index_select(1, positions[axis].reshape(-1)).view(len(channels), batch, slots)
            out[:, channels] = turned.transpose(0, 1)
        return out

    def project(self, layer: int, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Stored, Stored]:
        """x [M, d] at a layer's input -> q float32 [1, H, M, D], or 2 D wide where the key bias is kept apart; keys and
        values as they are stored, [1, Hkv, M, ...]."""
        module = self._layers[layer]
        attention: QuantAttention = module.self_attn
        qkv = attention.qkv_proj(module.input_layernorm(x).float())[None]
        keys, values = (self.kv.empty(1, self.kv_heads, len(x), self.head_dim, self.device) for _ in range(2))
        cos, sin = (t[None] for t in rotary)
        return attention.append(qkv, (cos, sin), keys, values, 0), keys, values

    def block_bytes(self, page_size: int) -> int:
        """Bytes of `page_size` tokens of one layer in the pool."""
        return block_bytes(page_size, self.kv_heads, self.head_dim, self.kv.form)

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer: x [M, d] and what attention gave, float32 [M, H * D] -> [M, d]."""
        module = self._layers[layer]
        x = x + module.self_attn.o_proj(attended).to(x.dtype)
        return x + module.mlp(module.post_attention_layernorm(x))

    def logits(self, x: Tensor) -> Tensor:
        """x [M, d] after the last layer -> float32 [M, vocabulary]."""
        return self.model.lm_head(self.text.norm(x)).float()

    def decoder_layer(self, layer: int) -> Any:
        """The module, for token scores."""
        return self._layers[layer]


def _refusal(model: Any) -> str:
    scheme, parts = model_scheme(model), quantized_modules(model)
    found = f"a float one beside {scheme.name} parts {', '.join(parts)}" if parts else "a float one"
    return (
        f"model: the engine serves quantized language models, this one is {found}; use `quota run` or `quota.load` with"
        f" it, or `quota calibrate --scheme {DEFAULT.name}` the float model"
    )
