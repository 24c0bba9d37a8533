"""LLaVA with a Pixtral tower: images of any size in patches, each of which attends to its whole image, with a rotary
embedding over rows and columns; Mistral decoder.

An image of h x w visual tokens is h runs of w in the prompt. A break token follows each run and an end token the last:
both stay text. The configuration names neither of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.pixtral.modeling_pixtral import (
    PixtralAttentionLayer,
    PixtralVisionModel,
    PixtralVisionRotaryEmbedding,
)
from transformers.processing_utils import ProcessorMixin

from quota.core.errors import CheckpointError, UsageError
from quota.models.base import KeyRules, submodule, submodule_weight
from quota.models.groups import Group, Groups, Norms, Part
from quota.models.images import ImageIndex, ImageInput, PatchGrid
from quota.models.llava import Llava
from quota.nn.embedding import PatchEmbedding
from quota.nn.float_attention import float_attention
from quota.nn.linear import SchemeLinear, without_grad
from quota.nn.mlp import QuantMLP
from quota.ops.qkv_append import apply_rotary


class PixtralProcessor(ProcessorMixin):
    """Images and text as upstream's processor of this name makes them, which cannot be imported without torchvision.
    Files name upstream's class, so this one has its name."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size, self.spatial_merge_size = patch_size, spatial_merge_size
        self.image_token, self.image_break_token, self.image_end_token = image_token, image_break_token, image_end_token
        self.image_token_id, self.image_break_token_id, self.image_end_token_id = tokenizer.convert_tokens_to_ids(
            [image_token, image_break_token, image_end_token]
        )

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def _process_images(self, images: Any, **options: Any) -> Any:
        return super()._process_images(images, **{**options, "patch_size": self.patch_size * self.spatial_merge_size})

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text of one image: a run of image tokens for each row, a break behind each, the end behind the last."""
        rows, columns = (
            int(edge) // (self.patch_size * self.spatial_merge_size) for edge in image_inputs["image_sizes"][image_idx]
        )
        return self.image_break_token.join([self.image_token * columns] * rows) + self.image_end_token


class LlavaPixtral(Llava):
    """See the module."""

    title, published = "LLaVA with Pixtral", "Pixtral-12B"
    description = "llava: Pixtral vision tower + two-layer projector + Mistral decoder"
    tower = "pixtral"
    class_tokens = 0
    decoders: ClassVar[Mapping[str, type[nn.Module]]] = {"mistral": MistralRotaryEmbedding}
    attention: ClassVar[Mapping[Part, str]] = {**Llava.attention, "vision": "attention"}
    groups: ClassVar[Groups] = {
        **Llava.groups,
        "vision": (
            Group(
                "attention.qkv_proj",
                ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                "attention_norm",
                "rows",
            ),
            Group("attention.o_proj", ("attention.o_proj",), None, "columns"),
            Group("feed_forward.gate_up_proj", ("feed_forward.gate_proj", "feed_forward.up_proj"), "ffn_norm"),
            Group("feed_forward.down_proj", ("feed_forward.down_proj",), "up"),
        ),
    }
    norms: ClassVar[Norms] = {**Llava.norms, "vision": frozenset({"attention_norm", "ffn_norm"})}
    hub_rules: ClassVar[KeyRules | None] = (  # the tower's own names, without CLIP's `vision_model`
        (re.compile(r"^model\.vision_tower\."), "vision_tower."),
        *(Llava.hub_rules or ()),
    )
    vision_embed_path = "model.vision_tower.patch_conv"
    encoder_path = "model.vision_tower.transformer.layers"
    processor_class = PixtralProcessor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        vision = self.vision
        if self.drops_cls:
            raise CheckpointError(
                "vision_feature_select_strategy: expected full, got default; a Pixtral tower has no class token to drop"
            )
        self.visual_tokens = None
        self.patch = vision.num_channels * vision.patch_size**2
        self.dims["tower"] = self.tower

    # quantized modules

    def tower_modules(self, linears: Mapping[str, SchemeLinear], block: Any) -> dict[str, nn.Module]:
        gate_up, down = linears["feed_forward.gate_up_proj"], linears["feed_forward.down_proj"]
        return {
            "attention": QuantPixtralAttention(
                linears["attention.qkv_proj"], linears["attention.o_proj"], heads=self.vision_heads
            ),
            "feed_forward": QuantMLP(gate_up, down, act=self.vision.hidden_act),
        }

    def finish_tower(self, tower: Any) -> None:
        for layer in tower.transformer.layers[self.vision_layers_used :]:
            layer.__class__ = UnusedPixtralLayer
        tower.patch_conv = PatchEmbedding.replacing(tower.patch_conv)
        tower.__class__ = Tower  # same fields; only the order of work changes

    def fill_derived(self, model: Any) -> None:
        super().fill_derived(model)
        tower: Any = submodule(model, self.vision_path)
        tower.patch_positional_embedding = type(tower.patch_positional_embedding)(tower.config)

    # images

    def images(self, inputs: Mapping[str, Any]) -> tuple[ImageInput, ...]:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return ()
        found, side = [], self.vision.patch_size
        for image, size in zip(pixels, sizes_of(pixels, inputs.get("image_sizes")), strict=True):
            height, width = size
            found.append(ImageInput(image[:, :height, :width], (1, height // side, width // side)))
        return tuple(found)

    def image_tokens(self, image: ImageInput) -> int:
        if image.grid is None:
            raise UsageError(
                f"image: expected pixels and their grid of patches (1, h, w), got pixels {list(image.pixels.shape)}"
                " alone"
            )
        frames, rows, columns = image.grid
        if frames != 1 or min(rows, columns) < 1 or rows % self.merge or columns % self.merge:
            raise UsageError(f"image: expected a grid (1, h, w) of multiples of {self.merge}, got {image.grid}")
        wanted = [self.vision.num_channels, rows * self.vision.patch_size, columns * self.vision.patch_size]
        if list(image.pixels.shape) != wanted:
            raise UsageError(f"image: expected pixels {wanted} for grid {image.grid}, got {list(image.pixels.shape)}")
        return rows * columns // self.merge**2

    def encode(self, model: Any, images: Sequence[ImageInput]) -> list[Tensor]:
        weight = submodule_weight(model, self.embed_path)
        features = []
        for image in images:  # a float tower's sums may depend on what else is in a call
            pixels = image.pixels[None].to(weight)
            size = torch.tensor([pixels.shape[-2:]], device=weight.device)
            features.append(self.features_of(model.model, pixels, size).to(weight.dtype))
        return features

    def features_of(self, inner: Any, pixels: Tensor, sizes: Tensor) -> Tensor:
        """[visual tokens, hidden] of one image. inner: upstream's model without its head."""
        layer = self.vision_layers_used
        states = inner.vision_tower(pixels, image_sizes=sizes, output_hidden_states=layer).hidden_states[layer]
        return self.projected(inner.multi_modal_projector, states, sizes)

    def projected(self, projector: Any, states: Tensor, sizes: Tensor) -> Tensor:
        """states [1, patches, vision hidden] of one image -> [visual tokens, hidden]."""
        out: Tensor = projector(states)[0]
        return out

    def image_index(self, ids: Tensor, grids: Sequence[PatchGrid | None] = ()) -> ImageIndex:
        visual = ids == self.image_token_id
        # What follows a prompt's last visual token is the end token, and one behind any other closes an image.
        column = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(visual, column, -1).amax(-1, keepdim=True)
        end = ids.gather(1, (last + 1).clamp(max=ids.shape[1] - 1))
        behind = torch.cat([torch.zeros_like(visual[:, :1]), visual[:, :-1]], -1) & ~visual
        image = (behind & (ids == end)).long().cumsum(-1).masked_fill(~visual, -1)
        return ImageIndex(image, image)

    # the tower block by block

    def tower_rows(self, grid: PatchGrid | None) -> int:
        if grid is None:  # the largest image
            return int((self.vision.image_size // self.vision.patch_size) ** 2)
        return grid[1] * grid[2]

    def tower_input(self, module: Callable[[str], Any], image: ImageInput) -> Tensor:
        patches = module(self.vision_embed_path)(image.pixels[None].float())[0]
        out: Tensor = module(f"{self.vision_path}.ln_pre")(patches.flatten(1).T)
        return out

    def tower_block(
        self, layer: nn.Module, index: int, hidden: Tensor, valid: Tensor, grids: Sequence[PatchGrid] | None
    ) -> Tensor:
        assert grids is not None
        out = torch.zeros_like(hidden)
        for row, grid in enumerate(grids):
            n = self.tower_rows(grid)
            own = hidden[row : row + 1, :n]
            out[row, :n] = layer(own, None, position_embeddings=self._turns(own, grid))[0]
        return out

    def _turns(self, like: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
        """cos, sin [patches, D] of an image, as upstream's tower computes them."""
        rotary = PixtralVisionRotaryEmbedding(self.vision).to(like.device)
        found: tuple[Tensor, Tensor] = rotary(like, places(grid[1], grid[2], like.device))
        return found

    # costs

    def evaluation_pixels(self, processor: Any, limits: tuple[int | None, int | None]) -> Callable[[Any], Any] | None:
        if limits != (None, None):
            raise UsageError(
                f"min_pixels, max_pixels: expected none for {self.name}, whose processor limits the longer edge"
            )
        return None

    def vision_macs(self, visual_tokens: int) -> int:
        n, h, d = visual_tokens * self.merge**2, self.vision_hidden_size, self.hidden_size
        block = 4 * n * h * h + 2 * n * n * h + 3 * n * h * self.vision_mlp_size
        return n * self.patch * h + self.vision_layers_used * block + visual_tokens * (h * d + d * d)

    def pixel_shape(self, visual_tokens: int) -> tuple[tuple[int, ...], PatchGrid | None]:
        side = self.merge * int(visual_tokens**0.5)
        edge = side * self.vision.patch_size
        return (self.vision.num_channels, edge, edge), (1, side, side)


def places(rows: int, columns: int, device: torch.device) -> Tensor:
    """(row, column) of every patch in raster order, int64 [rows * columns, 2]."""
    return torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))


def sizes_of(pixels: Tensor, sizes: Tensor | Sequence[Sequence[int]] | None) -> list[tuple[int, int]]:
    """(height, width) of each image in padded pixels [N, 3, H, W]; sizes: as the processor gives them, None where
    nothing is padded."""
    if sizes is None:
        return [(pixels.shape[-2], pixels.shape[-1])] * len(pixels)
    return [(int(height), int(width)) for height, width in sizes]


class Tower(PixtralVisionModel):
    """Upstream's, one image at a time and without the padding around it, so that an image's features are the same alone
    and in any batch."""

    def forward(self, pixel_values: Tensor, image_sizes: Any = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """pixel_values [N, 3, H, W], image_sizes [N, 2] -> as upstream; hidden states where `output_hidden_states`
        names their numbers."""
        asked, count = kwargs.get("output_hidden_states"), len(self.transformer.layers) + 1
        numbers = [asked] if type(asked) is int else range(count) if asked is True else asked or ()
        kept = {number % count for number in numbers} | {count - 1}
        states = [
            self._states(image[None, :, :height, :width], kept)
            for image, (height, width) in zip(pixel_values, sizes_of(pixel_values, image_sizes), strict=True)
        ]
        joined = {number: torch.cat([found[number] for found in states], 1) for number in kept}
        return BaseModelOutputWithPooling(
            last_hidden_state=joined[count - 1],
            hidden_states=tuple(joined.get(number) for number in range(count)),  # type: ignore[misc]
        )

    def _states(self, pixels: Tensor, kept: Collection[int]) -> dict[int, Tensor]:
        """Hidden states [1, patches, hidden] of one image, by number: 0 is the first layer's input."""
        patches = self.patch_conv(pixels.to(self.patch_conv.weight.dtype))
        hidden = self.ln_pre(patches.flatten(2).transpose(1, 2))
        turns = self.patch_positional_embedding(hidden, places(patches.shape[-2], patches.shape[-1], hidden.device))
        found = {0: hidden}
        for number, layer in enumerate(self.transformer.layers, start=1):
            hidden = layer(hidden, None, position_embeddings=turns)
            if number in kept:
                found[number] = hidden
        return found


class UnusedPixtralLayer(PixtralAttentionLayer):
    """A layer above the one the features are taken from: same fields and state, not computed."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states, as they came."""
        return hidden_states


class QuantPixtralAttention(nn.Module):
    """Attention of the patches of one image to each other: quantized projections, float scores."""

    def __init__(self, qkv_proj: SchemeLinear, o_proj: SchemeLinear, *, heads: int) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj, self.heads = qkv_proj, o_proj, heads

    @without_grad
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [1, n, hidden] of one image, position_embeddings cos, sin [n, D] -> (same shape, None)."""
        assert position_embeddings is not None
        _, n, hidden = hidden_states.shape
        q, k, v = (
            self.qkv_proj(hidden_states.float()).view(1, n, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        )
        cos, sin = (side.float()[None] for side in position_embeddings)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        out = float_attention(q, k, v.contiguous(), hidden_states.dtype).transpose(1, 2).reshape(1, n, hidden)
        return self.o_proj(out).to(hidden_states.dtype), None
