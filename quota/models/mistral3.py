"""Mistral-Small 3.1 and later: Pixtral tower, a merger of 2 x 2 patches before a two-layer projector, Mistral
decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

from quota.models.base import Family
from quota.models.groups import Group, Groups, Norms
from quota.models.images import PatchGrid
from quota.models.llava_pixtral import LlavaPixtral
from quota.nn.linear import SchemeLinear, as_dtype_of, as_float32
from quota.nn.mlp import PROLOGUES, activate
from quota.nn.norm import RmsNorm


class Mistral3(LlavaPixtral):
    """See the module."""

    name, title, published = "mistral3", "Mistral-Small-3", "Mistral-Small-3.1-24B"
    model_class = "Mistral3ForConditionalGeneration"
    description = "mistral3: Pixtral vision tower + merger of patches + two-layer projector + Mistral decoder"
    groups: ClassVar[Groups] = {
        **LlavaPixtral.groups,
        "projector": (
            Group("patch_merger.merging_layer", ("patch_merger.merging_layer",)),
            *LlavaPixtral.groups["projector"],
        ),
    }
    norms: ClassVar[Norms] = {**LlavaPixtral.norms, "projector": frozenset({"norm"})}

    @classmethod
    def kind_of(cls, config: Any) -> type[Family]:
        return cls

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.merge = config.spatial_merge_size
        self.dims["spatial_merge_size"] = self.merge

    # quantized modules

    def projector_modules(self, linears: Mapping[str, SchemeLinear]) -> dict[str, nn.Module]:
        return dict(linears)

    def finish_projector(self, projector: Any) -> None:
        projector.__class__ = Projector  # same fields
        projector.norm = RmsNorm.replacing(projector.norm)

    def projected(self, projector: Any, states: Tensor, sizes: Tensor) -> Tensor:
        out: Tensor = projector(states[0], sizes).view(-1, self.hidden_size)
        return out

    # the tower block by block

    def projector_rows(self, hidden: Tensor, grid: PatchGrid | None) -> Tensor:
        assert grid is not None
        return merged(hidden, (grid[1], grid[2]), self.merge).flatten(1)

    def projector_block(self, layer: Any, hidden: Tensor) -> Tensor:
        # the norm is of single patches, which the merger's weight reads channel by channel
        patches = layer.norm(hidden.unflatten(-1, (self.merge**2, self.vision_hidden_size)))
        rows = layer.patch_merger.merging_layer(patches.transpose(-1, -2).flatten(-2))
        out: Tensor = layer.linear_2(layer.act(layer.linear_1(rows)))
        return out

    # costs

    def vision_macs(self, visual_tokens: int) -> int:
        merger = visual_tokens * (self.merge * self.vision_hidden_size) ** 2
        return super().vision_macs(visual_tokens) + merger


def merged(patches: Tensor, grid: tuple[int, int], merge: int) -> Tensor:
    """patches [rows * columns, C] of an image in raster order -> [tokens, merge^2, C], those of each token; the tokens
    are in raster order too."""
    blocks = patches.unflatten(0, (grid[0] // merge, merge, grid[1] // merge, merge))
    return blocks.transpose(1, 2).flatten(0, 1).flatten(1, 2)


class Projector(Mistral3MultiModalProjector):
    """Upstream's over quantized linears, every image by itself; the activation is the last one's prologue where there
    is one."""

    def forward(self, image_features: Tensor, image_sizes: Any) -> Tensor:
        """image_features [patches of all images, vision hidden], image_sizes [images, 2] pixels -> [1, tokens, text
        hidden], same dtype: upstream takes one dimension away, which must not be a single token's."""
        merge, side = self.patch_merger.spatial_merge_size, self.patch_merger.patch_size
        grids = [(int(height) // side, int(width) // side) for height, width in image_sizes]
        normed = self.norm(as_float32(image_features)).split([rows * columns for rows, columns in grids])
        blocks = [merged(patches, grid, merge) for patches, grid in zip(normed, grids, strict=True)]
        rows = torch.cat(blocks).transpose(1, 2).flatten(1)
        x = self.linear_1(self.patch_merger.merging_layer(rows))
        prologue = PROLOGUES.get(self.patch_merger.config.projector_hidden_act)
        if prologue is None:
            x = activate(self.act, x)
        return as_dtype_of(self.linear_2(x, prologue), image_features)[None]
