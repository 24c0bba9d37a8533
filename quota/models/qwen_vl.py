"""What the Qwen-VL models have in common: images of any size in patches, a tower over them, a 2 x 2 merger, a decoder
with M-RoPE. Each model's own file has its sizes, its tower's blocks and what else it adds.

An image of t x h x w patches (`image_grid_thw`, t = 1) becomes h / 2 * w / 2 visual tokens. The tower holds patches in
blocks of one merged token: the four patches of a token are neighbours in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.processing_utils import ProcessorMixin

from quota.core.errors import UsageError
from quota.models.base import Family, KeyRules, submodule, submodule_weight
from quota.models.groups import Norms, Part
from quota.models.images import ImageIndex, ImageInput, PatchGrid, runs
from quota.models.processing import WithoutVideos
from quota.models.qwen_tower import QuantMerger, TowerGeometry, geometry_of, tower_rotary, tower_width
from quota.nn.embedding import MultimodalRotary
from quota.nn.linear import SchemeLinear

_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}{%- if message['content'] is string"
    " -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{"
    " '<|vision_start|><|image_pad|><|vision_end|>' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif"
    " -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{"
    " '<|im_start|>assistant\\n' }}{%- endif -%}"
)


class QwenVL(Family):
    """See the module. rotary_class: upstream's, of the decoder; tower_class: upstream's tower, one image at a time;
    processor_class: upstream's without videos. token_px: side of a visual token of the published checkpoints. pixels:
    fewest and most that lmms-eval's built-in wrapper of the family gives to the processor. mlp_linears: of a tower
    block."""

    axes = 3
    fixed_rope = ("default",)
    max_new_tokens = 128
    attention: ClassVar[Mapping[Part, str]] = {"decoder": "self_attn", "vision": "attn"}
    norms: ClassVar[Norms] = {
        "decoder": frozenset({"input_layernorm", "post_attention_layernorm"}),
        "vision": frozenset({"norm1", "norm2"}),
        "projector": frozenset({"ln_q"}),
    }
    # Published checkpoints: `visual.*`, `model.layers.*`, `lm_head.*`; saved by transformers 5 also `model.visual.*`,
    # `model.language_model.*`.
    key_rules = (
        (re.compile(r"^visual\."), "model.visual."),
        (re.compile(r"^language_model\."), "model.language_model."),
        (re.compile(r"^model\.(?!language_model\.|visual\.)"), "model.language_model."),
    )
    hub_rules: ClassVar[KeyRules | None] = (
        (re.compile(r"^model\.visual\."), "visual."),
        (re.compile(r"^model\.language_model\."), "model."),
    )
    vision_path = "model.visual"
    vision_embed_path = "model.visual.patch_embed"
    encoder_path = "model.visual.blocks"
    projector_path = "model.visual.merger"
    visual_tokens = None
    rotary_class: ClassVar[type[nn.Module]]
    tower_class: ClassVar[type[nn.Module]]
    token_px: ClassVar[int] = 28
    pixels: ClassVar[tuple[int, int]] = (256 * 28**2, 1_605_632)
    mlp_linears: ClassVar[int] = 2

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        vision = self.vision
        self.vision_layers_used = self.vision_layers_total = vision.depth
        self.vision_hidden_size, self.vision_heads, self.merge = (
            tower_width(vision),
            vision.num_heads,
            vision.spatial_merge_size,
        )
        self.image_token_id = int(config.image_token_id)
        self.patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    # quantized modules

    def projector_modules(self, linears: Mapping[str, SchemeLinear]) -> dict[str, nn.Module]:
        return {"mlp": QuantMerger(linears["mlp.0"], linears["mlp.2"])}

    def finish_tower(self, tower: Any) -> None:
        tower.__class__ = self.tower_class  # same fields; only the order of work changes

    def rotary(self, device: Any) -> nn.Module:
        inner: Any = self.float_rotary()
        return MultimodalRotary(inner, self.channel_axes(inner.mrope_section), device=device)

    def float_rotary(self) -> nn.Module:
        return self.rotary_class(self.text)

    def fill_derived(self, model: Any) -> None:
        super().fill_derived(model)
        tower: Any = submodule(model, self.vision_path)
        tower.rotary_pos_emb = type(tower.rotary_pos_emb)(tower.config)

    # images and positions

    def image_tokens(self, image: ImageInput) -> int:
        if image.grid is None:
            raise UsageError(
                f"image: expected patches and their grid (1, h, w), got pixels {list(image.pixels.shape)} alone"
            )
        frames, rows, columns = image.grid
        if frames != 1 or min(rows, columns) < 1 or rows % self.merge or columns % self.merge:
            raise UsageError(
                f"image: expected a grid (1, h, w) of multiples of {self.merge}, got {image.grid}; videos are not"
                " supported"
            )
        if tuple(image.pixels.shape) != (rows * columns, self.patch):
            raise UsageError(
                f"image: expected pixels {[rows * columns, self.patch]} for grid {image.grid}, got"
                f" {list(image.pixels.shape)}"
            )
        return rows * columns // self.merge**2

    def encode(self, model: Any, images: Sequence[ImageInput]) -> list[Tensor]:
        weight = submodule_weight(model, self.embed_path)
        features = []
        for image in images:  # a float tower's sums may depend on what else is in a call
            grid = torch.tensor([image.grid], device=weight.device)
            found = model.model.get_image_features(
                pixel_values=image.pixels.to(weight), image_grid_thw=grid, return_dict=True
            )
            features.append(self.features_of(found).to(weight.dtype).clone())
        return features

    def features_of(self, found: Any) -> Tensor:
        """One image's, of what upstream's `get_image_features` returned."""
        features: Tensor = found.pooler_output[0]
        return features

    def image_index(self, ids: Tensor, grids: Sequence[PatchGrid | None] = ()) -> ImageIndex:
        image = runs(ids == self.image_token_id)  # markers stand between images
        return ImageIndex(image, image)

    def positions(self, model: Any, ids: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        kinds = (ids == self.image_token_id).int()[None]
        where = torch.tensor([list(grid) for grid in grids]) if grids else None
        found = model.model.get_rope_index(input_ids=ids[None], mm_token_type_ids=kinds, image_grid_thw=where)[0]
        return found[:, 0].long()

    def channel_axes(self, sections: Sequence[int]) -> list[int]:
        """Axis of a position that turns each pair of rotary channels. sections: pairs of each axis, here in a row."""
        return [number % 3 for number, size in enumerate(sections) for _ in range(size)]

    def rotary_axes(self, rotary: Any) -> list[tuple[int, int, int]]:
        spans: list[tuple[int, int, int]] = []
        for pair, axis in enumerate(self.channel_axes(rotary.inner.mrope_section)):
            if spans and spans[-1][2] == axis:
                spans[-1] = (spans[-1][0], pair + 1, axis)
            else:
                spans.append((pair, pair + 1, axis))
        half = self.head_dim // 2
        return [*spans, *((half + first, half + last, axis) for first, last, axis in spans)]

    # the tower block by block

    def tower_rows(self, grid: PatchGrid | None) -> int:
        assert grid is not None
        return grid[1] * grid[2]

    def tower_input(self, module: Callable[[str], Any], image: ImageInput) -> Tensor:
        assert image.grid is not None
        hidden, unit = module(self.vision_embed_path)(image.pixels.float()), self.merge**2
        return hidden.view(len(hidden) // unit, unit, -1)[geometry_of(self.vision, image.grid).order].flatten(0, 1)

    def tower_block(
        self, layer: nn.Module, index: int, hidden: Tensor, valid: Tensor, grids: Sequence[PatchGrid] | None
    ) -> Tensor:
        assert grids is not None
        where = [geometry_of(self.vision, grid) for grid in grids]
        segments = [size for geometry in where for size in self.segments(index, geometry)]
        bounds = torch.tensor([0, *segments], dtype=torch.int32, device=hidden.device).cumsum(0, dtype=torch.int32)
        rotary = [tower_rotary(geometry, self.vision) for geometry in where]
        cos, sin = (torch.cat(side).to(hidden.device) for side in zip(*rotary, strict=True))
        out = torch.zeros_like(hidden)
        out[valid] = layer(hidden[valid], cu_seqlens=bounds, position_embeddings=(cos, sin))
        return out

    def segments(self, index: int, where: TowerGeometry) -> tuple[int, ...]:
        """Patches that attend to each other in block `index`, in order."""
        return (where.patches,)

    def projector_rows(self, hidden: Tensor, grid: PatchGrid | None) -> Tensor:
        assert grid is not None
        return hidden.view(len(hidden) // self.merge**2, -1)[geometry_of(self.vision, grid).inverse]

    def projector_block(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        # the merger normalises single patches and flattens the batch
        flat = layer(hidden.reshape(-1, self.vision_hidden_size))
        return flat.view(*hidden.shape[:2], -1)

    # words and costs

    def evaluation_pixels(self, processor: Any, limits: tuple[int | None, int | None]) -> Callable[[Any], Any] | None:
        # other token sizes are not what the built-in wrapper is written for
        published = self.vision.patch_size * self.merge == self.token_px
        size = processor.image_processor.size
        usual = self.pixels if published else (size["shortest_edge"], size["longest_edge"])
        fewest, most = (given or own for given, own in zip(limits, usual, strict=True))
        if fewest > most:
            raise UsageError(f"min_pixels: expected at most max_pixels ({most}), got {fewest}")
        processor.image_processor.size = {"shortest_edge": fewest, "longest_edge": most}
        return partial(_fetched, self.token_px) if published else None

    @property
    def vision_mlp_size(self) -> int:
        """Width of a tower block's MLP."""
        return int(self.vision.intermediate_size)

    def vision_macs(self, visual_tokens: int) -> int:
        unit, h = self.merge**2, self.vision_hidden_size
        n = visual_tokens * unit
        linears = n * (4 * h * h + self.mlp_linears * h * self.vision_mlp_size) * self.vision_layers_used
        attention = 2 * h * n * sum(self.attended(index, n) for index in range(self.vision_layers_used))
        merger = n * h * (unit * h + self.hidden_size)
        return n * self.patch * h + linears + attention + merger

    def attended(self, index: int, patches: int) -> int:
        """Keys of each query in block `index` of an image of so many patches."""
        return patches

    def pixel_shape(self, visual_tokens: int) -> tuple[tuple[int, ...], PatchGrid | None]:
        side = self.merge * math.isqrt(visual_tokens)
        return (side * side, self.patch), (1, side, side)


def _fetched(token_px: int, image: Any) -> Any:
    """As qwen-vl-utils resizes an image first: within 4 to 16 384 tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    width, height = image.size
    rows, columns = smart_resize(
        height, width, factor=token_px, min_pixels=4 * token_px**2, max_pixels=16_384 * token_px**2
    )
    return image.resize((columns, rows))


class QwenProcessor(WithoutVideos):
    """What the processors of the Qwen-VL models have in common."""

    video_type = "Qwen2VLVideoProcessor"

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = (
            tokenizer.convert_tokens_to_ids(token) for token in (self.image_token, self.video_token)
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template or _CHAT_TEMPLATE)
