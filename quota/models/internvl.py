"""InternVL3 and InternVL3.5, dense: InternViT over the tiles of an image, each 2 x 2 patches side by side to the
projector, Qwen2 or Qwen3 decoder.

The processor fits an image into a grid of tiles of its shape and puts the whole image behind them as one more tile;
markers stand around an image's tokens. Every tile is a raster of its own. LayerScale stays beside the quantized
linears, as the norms do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.internvl import modeling_internvl as modeling
from transformers.models.internvl import processing_internvl as upstream
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from quota.core.errors import CheckpointError, UsageError
from quota.models.base import submodule_weight
from quota.models.groups import Group, Groups, Norms, Part
from quota.models.images import ImageIndex, ImageInfo, ImageInput, PatchGrid, image_digest, runs
from quota.models.llava import Llava, QuantClipAttention
from quota.models.processing import WithoutVideos
from quota.nn.embedding import PatchEmbedding
from quota.nn.linear import SchemeLinear, as_dtype_of, as_float32, without_grad
from quota.nn.mlp import PROLOGUES, QuantFeedForward, activate
from quota.nn.norm import RmsNorm


class InternVLProcessor(WithoutVideos, upstream.InternVLProcessor):
    """Upstream's for images and text."""

    video_type = "InternVLVideoProcessor"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        upstream.InternVLProcessor.__init__(
            self, image_processor, tokenizer, None, image_seq_length, chat_template=chat_template
        )

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """As upstream; what a call returned has its tiles in the ids alone."""
        if "num_patches" in image_inputs:
            return str(super().replace_image_token(image_inputs, image_idx, **kwargs))
        image = runs(torch.as_tensor(image_inputs["input_ids"]) == self.image_token_id)
        sizes = [n for row in image for n in row[row >= 0].bincount().tolist()]
        return f"{self.start_image_token}{self.image_token * sizes[image_idx]}{self.end_image_token}"


class Projector(modeling.InternVLMultiModalProjector):
    """Upstream's over quantized linears; a GELU between them is the second one's prologue."""

    @without_grad
    def forward(self, image_features: Tensor) -> Tensor:
        """image_features [..., 4 vision hidden] -> [..., text hidden], same dtype."""
        x, prologue = self.linear_1(as_float32(self.layer_norm(image_features))), self.prologue
        return as_dtype_of(self.linear_2(activate(self.act, x) if prologue is None else x, prologue), image_features)


class UnusedLayer(modeling.InternVLVisionLayer):
    """A layer above the one the projector takes its features from: same fields and state, not computed."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states, as they came."""
        return hidden_states


class InternVL(Llava):
    """See the module."""

    name, title, published = "internvl", "InternVL", "InternVL3.5-8B"
    model_class = "InternVLForConditionalGeneration"
    description = "internvl: InternViT over tiles + pixel shuffle + two-layer projector + dense Qwen2 or Qwen3 decoder"
    tower = "internvl_vision"
    decoders: ClassVar[Mapping[str, type[nn.Module]]] = {
        "qwen2": Llava.decoders["qwen2"],
        "qwen3": Qwen3RotaryEmbedding,
    }
    attention: ClassVar[Mapping[Part, str]] = {**Llava.attention, "vision": "attention"}
    groups: ClassVar[Groups] = {
        **Llava.groups,
        "vision": (
            Group(
                "attention.qkv_proj",
                ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                "layernorm_before",
                "rows",
            ),
            Group("attention.out_proj", ("attention.projection_layer",), None, "columns"),
            Group("mlp.fc1", ("mlp.fc1",), "layernorm_after"),
            Group("mlp.fc2", ("mlp.fc2",)),
        ),
    }
    norms: ClassVar[Norms] = {
        **Llava.norms,
        # "": LayerScale, parameters of the block itself
        "vision": frozenset({"layernorm_before", "layernorm_after", "attention.q_norm", "attention.k_norm", ""}),
        "projector": frozenset({"layer_norm"}),
    }
    block_arguments: ClassVar[Mapping[str, Any]] = {}
    hub_rules = ()  # InternVL3.5's published checkpoints have the names inside the model
    encoder_path = "model.vision_tower.encoder.layer"
    processor_class = InternVLProcessor

    @classmethod
    def kind_of(cls, config: Any) -> type[Llava]:
        return cls

    def __init__(self, config: Any) -> None:
        self.merge = round(1 / config.downsample_ratio)
        super().__init__(config)
        vision, self.visual_tokens = self.vision, None
        side = self.tile_px // vision.patch_size[0]
        whole = self.merge >= 1 and abs(self.merge * config.downsample_ratio - 1) < 1e-6 and not side % self.merge
        if not self.drops_cls or not vision.use_mean_pooling or not whole:
            raise CheckpointError(
                "vision_feature_select_strategy, vision_config.use_mean_pooling, downsample_ratio: expected default,"
                f" true and one over a divisor of {side} patches, got {config.vision_feature_select_strategy},"
                f" {vision.use_mean_pooling}, {config.downsample_ratio}"
            )
        self.side = side // self.merge
        self.dims |= {"tower": [self.merge, vision.norm_type, vision.use_qk_norm]}

    def tile_size(self) -> tuple[int, int]:
        sizes = [tuple(getattr(self.vision, name)) for name in ("image_size", "patch_size")]
        if any(len(size) != 2 or size[0] != size[1] for size in sizes):
            raise CheckpointError(
                f"vision_config.image_size, vision_config.patch_size: expected squares, got {sizes[0]} and {sizes[1]}"
            )
        return int(sizes[0][0]), int(sizes[1][0])

    # quantized modules

    def tower_modules(self, linears: Mapping[str, SchemeLinear], block: Any) -> dict[str, nn.Module]:
        norms = {name: RmsNorm.replacing(norm) for name, norm in block.named_children() if _is_rms(norm)}
        qk = [RmsNorm.replacing(norm) for norm in (block.attention.q_norm, block.attention.k_norm) if _is_rms(norm)]
        qkv, out = linears["attention.qkv_proj"], linears["attention.out_proj"]
        return {
            **norms,
            "attention": QuantClipAttention(qkv, out, heads=self.vision_heads, norms=qk),
            "mlp": QuantFeedForward(linears["mlp.fc1"], linears["mlp.fc2"], act=self.vision.hidden_act),
        }

    def projector_modules(self, linears: Mapping[str, SchemeLinear]) -> dict[str, nn.Module]:
        return dict(linears)

    def finish_tower(self, tower: Any) -> None:
        for layer in tower.encoder.layer[self.vision_layers_used :]:
            layer.__class__ = UnusedLayer
        patches = tower.embeddings.patch_embeddings
        patches.projection = PatchEmbedding.replacing(patches.projection)

    def finish_projector(self, projector: Any) -> None:
        projector.__class__ = Projector  # same fields
        projector.prologue = PROLOGUES.get(self.config.projector_hidden_act)

    # images

    def images(self, inputs: Mapping[str, Any]) -> tuple[ImageInput, ...]:
        """As in the base; without ids every tile counts as an image."""
        pixels, ids = inputs.get("pixel_values"), inputs.get("input_ids")
        if pixels is None:
            return ()
        counts = [1] * len(pixels)
        if ids is not None:
            image = self.image_index(torch.as_tensor(ids)).image
            sizes = [n for row in image for n in row[row >= 0].bincount().tolist()]
            if sum(sizes) == len(pixels) * self.tile_tokens:  # else upstream says that tokens and features differ
                counts = [n // self.tile_tokens for n in sizes]
        return tuple(ImageInput(part, (len(part), 1, 1)) for part in pixels.split(counts))

    def image_tokens(self, image: ImageInput) -> int:
        px = self.tile_px
        tiles = 0 if image.grid is None else image.grid[0]
        if tiles < 1 or tuple(image.pixels.shape) != (tiles, 3, px, px):
            raise UsageError(
                f"image: expected tiles of pixels {[3, px, px]} and their number, got {list(image.pixels.shape)} and"
                f" {image.grid}"
            )
        return tiles * self.tile_tokens

    def shown(self, image: ImageInput) -> list[ImageInfo]:
        return [ImageInfo(image_digest(tile), (self.side, self.side)) for tile in image.pixels]

    def encode(self, model: Any, images: Sequence[ImageInput]) -> list[Tensor]:
        weight = submodule_weight(model, self.embed_path)
        features = []
        for image in images:  # a float tower's sums may depend on what else is in a call
            found = model.model.get_image_features(pixel_values=image.pixels.to(weight), return_dict=True)
            features.append(found.pooler_output.flatten(0, 1).to(weight.dtype).clone())
        return features

    def image_index(self, ids: Tensor, grids: Sequence[PatchGrid | None] = ()) -> ImageIndex:
        image = runs(ids == self.image_token_id)  # markers stand between images
        column = torch.arange(ids.shape[1], device=ids.device)
        begins = (image >= 0) & (image != torch.cat([torch.full_like(image[:, :1], -1), image[:, :-1]], -1))
        place = column - torch.where(begins, column, 0).cummax(-1).values
        tile = ((image >= 0) & (place % self.tile_tokens == 0)).long().cumsum(-1) - 1
        return ImageIndex(image, tile.masked_fill(image < 0, -1))

    def pictures(self, image: Any, given: ImageInput) -> list[Any]:
        tiles = len(given.pixels) - 1
        if tiles < 1:
            return [image]
        ratio = image.width / image.height
        columns = min((n for n in range(1, tiles + 1) if tiles % n == 0), key=lambda n: abs(ratio - n * n / tiles))
        width, height = image.width / columns, image.height * columns / tiles
        boxes = [
            (round(column * width), round(row * height), math.ceil((column + 1) * width), math.ceil((row + 1) * height))
            for row in range(tiles // columns)
            for column in range(columns)
        ]
        return [*map(image.crop, boxes), image]

    # the tower block by block

    def enter_tower(self, module: Callable[[str], Any], embedded: Tensor) -> Tensor:
        return embedded

    def projector_rows(self, hidden: Tensor, grid: PatchGrid | None) -> Tensor:
        patches = super().projector_rows(hidden, grid)
        side = self.side * self.merge
        tiles = patches.view(len(patches) // side**2, side, side, -1)
        shuffle: Any = modeling.InternVLModel.pixel_shuffle  # reads nothing of a model
        rows: Tensor = shuffle(None, tiles, scale_factor=self.config.downsample_ratio)
        return rows.reshape(-1, rows.shape[-1])

    # costs

    def vision_macs(self, visual_tokens: int) -> int:
        return -(-visual_tokens // self.tile_tokens) * super().vision_macs(self.tile_tokens)

    def pixel_shape(self, visual_tokens: int) -> tuple[tuple[int, ...], PatchGrid | None]:
        """As in the base; UsageError for what is no number of whole tiles."""
        tiles, rest = divmod(visual_tokens, self.tile_tokens)
        if rest or not tiles:
            raise UsageError(f"visual tokens: expected a multiple of {self.tile_tokens}, got {visual_tokens}")
        return (tiles, 3, self.tile_px, self.tile_px), (tiles, 1, 1)


def _is_rms(norm: nn.Module) -> bool:
    return isinstance(norm, modeling.InternVLVisionRMSNorm)
