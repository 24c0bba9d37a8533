"""LLaVA-1.5: CLIP vision tower, two-layer projector, LLaMA or Qwen2 decoder. An image always becomes the same number of
visual tokens.

The same with another tower is in a file of its own: `llava_dinov2`, `llava_pixtral`, `llava_siglip`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from quota.core.errors import CheckpointError, UsageError
from quota.models.base import Family, KeyRules, submodule_weight
from quota.models.groups import DECODER_GROUPS, Group, Groups, Norms
from quota.models.images import ImageIndex, ImageInput, PatchGrid
from quota.nn.embedding import PatchEmbedding, Rotary
from quota.nn.float_attention import float_attention
from quota.nn.linear import SchemeLinear, as_dtype_of, as_float32, without_grad
from quota.nn.mlp import PROLOGUES, QuantFeedForward, activate


class Llava(Family):
    """See the module."""

    name, title, published = "llava", "LLaVA", "LLaVA-1.5-7B"
    model_class = "LlavaForConditionalGeneration"
    description = "llava: CLIP vision tower + two-layer projector + LLaMA or Qwen2 decoder"
    tower: ClassVar[str] = "clip_vision_model"  # transformers' model_type of the vision configuration
    class_tokens: ClassVar[int] = 1  # rows of the tower before the patches
    decoders: ClassVar[Mapping[str, type[nn.Module]]] = {"llama": LlamaRotaryEmbedding, "qwen2": Qwen2RotaryEmbedding}
    groups: ClassVar[Groups] = {
        "decoder": DECODER_GROUPS,
        "vision": (
            Group(
                "self_attn.qkv_proj",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "layer_norm1",
                "rows",
            ),
            Group("self_attn.out_proj", ("self_attn.out_proj",), None, "columns"),
            Group("mlp.fc1", ("mlp.fc1",), "layer_norm2"),
            Group("mlp.fc2", ("mlp.fc2",)),
        ),
        "projector": (Group("linear_1", ("linear_1",)), Group("linear_2", ("linear_2",))),
    }
    norms: ClassVar[Norms] = {
        "decoder": frozenset({"input_layernorm", "post_attention_layernorm"}),
        "vision": frozenset({"layer_norm1", "layer_norm2"}),
        "projector": frozenset(),
    }
    # Published checkpoints name their tensors in several ways; the module path inside the model is the canonical one.
    key_rules: ClassVar[KeyRules] = (
        (re.compile(r"^language_model\.lm_head\."), "lm_head."),
        (re.compile(r"^(?:model\.)?language_model\.model\."), "model.language_model."),
        (re.compile(r"^language_model\."), "model.language_model."),
        (re.compile(r"^(?:model\.)?vision_tower\.vision_model\."), "model.vision_tower."),
        (re.compile(r"^vision_tower\."), "model.vision_tower."),
        (re.compile(r"^multi_modal_projector\."), "model.multi_modal_projector."),
    )
    block_arguments: ClassVar[Mapping[str, Any]] = {"attention_mask": None}  # of a tower block
    hub_rules: ClassVar[KeyRules | None] = (
        (re.compile(r"^lm_head\."), "language_model.lm_head."),
        (re.compile(r"^model\.language_model\."), "language_model.model."),
        (re.compile(r"^model\.vision_tower\."), "vision_tower.vision_model."),
        (re.compile(r"^model\.multi_modal_projector\."), "multi_modal_projector."),
    )
    vision_path = "model.vision_tower"
    vision_embed_path = "model.vision_tower.embeddings"
    encoder_path = "model.vision_tower.encoder.layers"
    projector_path = "model.multi_modal_projector"

    @classmethod
    def kind_of(cls, config: Any) -> type[Family]:
        """The class for the tower; an unknown one is refused by the class for CLIP's."""
        kind = config.vision_config.model_type
        if kind == "dinov2":
            from quota.models.llava_dinov2 import LlavaDinov2

            return LlavaDinov2
        if kind == "siglip_vision_model":
            from quota.models.llava_siglip import LlavaSiglip

            return LlavaSiglip
        if kind == "pixtral":
            from quota.models.llava_pixtral import LlavaPixtral

            return LlavaPixtral
        return cls

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text, vision = self.text, self.vision
        if text.model_type not in self.decoders or vision.model_type != self.tower:
            raise CheckpointError(
                f"model_type: expected {self.description}, got {config.model_type} with {vision.model_type!r} and"
                f" {text.model_type!r}"
            )
        feature = getattr(config, "vision_feature_layer", -1)
        if not isinstance(feature, int):
            raise CheckpointError(
                f"vision_feature_layer: expected one integer, got {feature!r}; concatenated feature layers are not"
                " supported"
            )
        total = vision.num_hidden_layers
        used = (
            feature if feature >= 0 else total + 1 + feature
        )  # index into hidden_states: entry i is the input of layer i
        if not 0 <= used <= total:
            raise CheckpointError(
                f"vision_feature_layer: expected an index into {total + 1} hidden states, got {feature}"
            )
        self.vision_layers_used, self.vision_layers_total = used, total
        self.vision_hidden_size, self.vision_heads = vision.hidden_size, vision.num_attention_heads
        self.drops_cls = getattr(config, "vision_feature_select_strategy", "full") == "default"
        self.tile_px, patch_px = self.tile_size()
        self.patches = (self.tile_px // patch_px) ** 2
        self.tile_tokens = (self.tower_rows(None) - int(self.drops_cls)) // self.merge**2
        self.visual_tokens = self.tile_tokens
        token = getattr(config, "image_token_id", None)
        self.image_token_id = int(config.image_token_index if token is None else token)
        dims = [
            vision.hidden_size,
            self.vision_mlp_size,
            total,
            self.vision_heads,
            self.tile_px,
            patch_px,
        ]
        self.dims = {"vision": dims, "vision_layers_used": used, "visual_tokens": self.tile_tokens}

    def tile_size(self) -> tuple[int, int]:
        """Sides of what the tower sees at once and of a patch, pixels."""
        for name in ("image_size", "patch_size"):
            if type(getattr(self.vision, name)) is not int:
                raise CheckpointError(
                    f"vision_config.{name}: expected a whole number, got {getattr(self.vision, name)!r}"
                )
        return self.vision.image_size, self.vision.patch_size

    @property
    def vision_mlp_size(self) -> int:
        """Width of a tower block's MLP."""
        return int(self.vision.intermediate_size)

    # quantized modules

    def tower_modules(self, linears: Mapping[str, SchemeLinear], block: Any) -> dict[str, nn.Module]:
        return {
            "self_attn": QuantClipAttention(
                linears["self_attn.qkv_proj"], linears["self_attn.out_proj"], heads=self.vision_heads
            ),
            "mlp": QuantFeedForward(linears["mlp.fc1"], linears["mlp.fc2"], act=self.vision.hidden_act),
        }

    def projector_modules(self, linears: Mapping[str, SchemeLinear]) -> dict[str, nn.Module]:
        return {"": QuantProjector(linears["linear_1"], linears["linear_2"], self.config.projector_hidden_act)}

    def finish_tower(self, tower: Any) -> None:
        for layer in tower.encoder.layers[self.vision_layers_used :]:
            layer.__class__ = UnusedLayer
        tower.embeddings.patch_embedding = PatchEmbedding.replacing(tower.embeddings.patch_embedding)

    def rotary(self, device: Any) -> nn.Module:
        return Rotary(self.text, device=device)

    def float_rotary(self) -> nn.Module:
        return self.decoders[self.text.model_type](self.text)

    # images

    def image_tokens(self, image: ImageInput) -> int:
        size = self.tile_px
        if tuple(image.pixels.shape) != (3, size, size):
            raise UsageError(f"image: expected pixels {[3, size, size]}, got {list(image.pixels.shape)}")
        return self.tile_tokens

    def encode(self, model: Any, images: Sequence[ImageInput]) -> list[Tensor]:
        weight = submodule_weight(model, self.embed_path)
        pixels = torch.stack([image.pixels for image in images]).to(weight)
        features = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        return [part.to(weight.dtype).clone() for part in features]

    def image_index(self, ids: Tensor, grids: Sequence[PatchGrid | None] = ()) -> ImageIndex:
        visual = ids == self.image_token_id  # images may stand side by side: only their length tells them apart
        image = ((visual.long().cumsum(-1) - 1) // self.tile_tokens).masked_fill(~visual, -1)
        return ImageIndex(image, image)

    # the tower block by block

    def tower_rows(self, grid: PatchGrid | None) -> int:
        return (1 if grid is None else grid[0]) * (self.patches + self.class_tokens)

    def tower_input(self, module: Callable[[str], Any], image: ImageInput) -> Tensor:
        size = self.tile_px
        if tuple(image.pixels.shape[-2:]) != (size, size):
            found = list(image.pixels.shape[-2:])
            raise CheckpointError(
                f"pixel_values: expected {size} x {size} pixels, got {found}; the processor does not fit the model"
            )
        tiles = image.pixels.float().view(-1, *image.pixels.shape[-3:])
        return self.enter_tower(module, module(self.vision_embed_path)(tiles)).flatten(0, 1)

    def enter_tower(self, module: Callable[[str], Any], embedded: Tensor) -> Tensor:
        """Patches and class token [B, rows, C] as the embeddings give them -> the first block's input."""
        return module(f"{self.vision_path}.pre_layrnorm")(embedded)

    def tower_block(
        self, layer: nn.Module, index: int, hidden: Tensor, valid: Tensor, grids: Sequence[PatchGrid] | None
    ) -> Tensor:
        out = torch.zeros_like(hidden)
        tiles = hidden[valid].view(-1, self.tower_rows(None), hidden.shape[-1])
        out[valid] = layer(tiles, **self.block_arguments).flatten(0, 1)
        return out

    def projector_rows(self, hidden: Tensor, grid: PatchGrid | None) -> Tensor:
        if not self.drops_cls:
            return hidden
        return hidden.view(-1, self.tower_rows(None), hidden.shape[-1])[:, 1:].flatten(0, 1)

    # costs

    def vision_macs(self, visual_tokens: int) -> int:
        v, d = self.vision, self.hidden_size
        n, h, m = self.tower_rows(None), v.hidden_size, self.vision_mlp_size
        block = 4 * n * h * h + 2 * n * n * h + 2 * n * h * m
        return (
            self.patches * v.num_channels * self.tile_size()[1] ** 2 * h
            + self.vision_layers_used * block
            + self.tile_tokens * (self.merge**2 * h * d + d * d)
        )

    def pixel_shape(self, visual_tokens: int) -> tuple[tuple[int, ...], PatchGrid | None]:
        return (3, self.tile_px, self.tile_px), None


class UnusedLayer(CLIPEncoderLayer):
    """A layer above the one LLaVA takes its features from: same fields and state, not computed."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states, as they came."""
        return hidden_states


class QuantClipAttention(nn.Module):
    """CLIP's bidirectional attention: quantized projections, float scores. Images are attended one at a time, so that
    an image gives the same features alone and in a batch."""

    def __init__(
        self, qkv_proj: SchemeLinear, out_proj: SchemeLinear, *, heads: int, norms: Sequence[nn.Module] = ()
    ) -> None:
        """norms: of all queries and of all keys of a token, where there are any."""
        super().__init__()
        self.qkv_proj, self.out_proj, self.heads = qkv_proj, out_proj, heads
        self.q_norm: nn.Module | None
        self.k_norm: nn.Module | None
        self.q_norm, self.k_norm = norms or (None, None)

    @without_grad
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, hidden] -> (output of the same shape, None)."""
        batch, tokens, hidden = hidden_states.shape
        x = self.qkv_proj(hidden_states.float())
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = x.chunk(3, -1)
            x = torch.cat([self.q_norm(q), self.k_norm(k), v], -1)
        x = x.view(batch, tokens, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        masks = (
            [None] * batch
            if attention_mask is None
            else [attention_mask.expand(batch, -1, -1, -1)[b : b + 1] for b in range(batch)]
        )
        rows = []
        for image, mask in enumerate(masks):
            q, k, v = x[:, image : image + 1].contiguous()
            rows.append(float_attention(q, k, v, hidden_states.dtype, mask))
        out = torch.cat(rows).transpose(1, 2).reshape(batch, tokens, hidden)
        return self.out_proj(out).to(hidden_states.dtype), None


class QuantProjector(nn.Module):
    """linear_2(act(linear_1(x))): vision features to the language model's width."""

    def __init__(self, linear_1: SchemeLinear, linear_2: SchemeLinear, act: str) -> None:
        super().__init__()
        self.linear_1, self.linear_2, self.act = linear_1, linear_2, ACT2FN[act]
        self._prologue = PROLOGUES.get(act)

    @without_grad
    def forward(self, image_features: Tensor) -> Tensor:
        """image_features [..., vision hidden] -> [..., text hidden], same dtype."""
        x = self.linear_1(as_float32(image_features))
        if self._prologue is None:
            x = activate(self.act, x)
        return as_dtype_of(self.linear_2(x, self._prologue), image_features)
