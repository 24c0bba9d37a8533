"""What LLaVA-NeXT and LLaVA-OneVision add to a LLaVA: an image of any size, shown whole in one tile and cut into a grid
of tiles.

The processor fits the image into the best of the configured resolutions. Of the grid's features the rows or columns
that saw nothing but padding are left out, where the family sets a limit the rest shrinks to it, and a newline token
ends each line. So an image is two rasters of visual tokens, the overview and the grid; newlines are text. An image of
one tile has a newline alone behind it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from quota.core.errors import CheckpointError, UsageError
from quota.models.base import KeyRules, submodule_weight
from quota.models.images import ImageIndex, ImageInfo, ImageInput, PatchGrid, image_digest, runs
from quota.models.llava import Llava

_DECIMALS = 7  # of a side in patches before it is cut to whole ones; as the families' own code has it
_SHRINKS_ABOVE = 1.1  # sides of the grid over those of the limit; as the families' own code has it


@dataclass(frozen=True)
class Lines:
    """The grid of one image. tiles: rows and columns of tiles. top, left: patches of padding on each side. shape: rows
    and columns of what lies between. shrunk: rows and columns of visual tokens, `shape` where nothing shrinks."""

    tiles: tuple[int, int]
    top: int
    left: int
    shape: tuple[int, int]
    shrunk: tuple[int, int]


@lru_cache(maxsize=1024)
def lines_of(
    height: int, width: int, resolutions: tuple[tuple[int, int], ...], tile_px: int, side: int, most: int | None
) -> Lines:
    """height, width of an image in pixels; resolutions: what it may be fitted into; tile_px, side: of a tile in pixels
    and in patches; most: tiles whose tokens are the limit of the grid."""
    best = select_best_resolution((height, width), list(resolutions))
    tiles = (best[0] // tile_px, best[1] // tile_px)
    rows, columns = (side * count for count in tiles)
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), _DECIMALS))) // 2
    else:
        left = (columns - int(round(width * (rows / height), _DECIMALS))) // 2
    shape = (rows - 2 * top, columns - 2 * left)
    ratio = 0.0 if most is None else math.sqrt(shape[0] * shape[1] / (most * side**2))
    shrunk = (int(shape[0] // ratio), int(shape[1] // ratio)) if ratio > _SHRINKS_ABOVE else shape
    return Lines(tiles, top, left, shape, shrunk)


class AnyRes(Llava):
    """See the module; before a LLaVA's class among the bases. most: tiles whose tokens are the limit of a grid."""

    key_rules: ClassVar[KeyRules] = (*Llava.key_rules, (re.compile(r"^image_newline$"), "model.image_newline"))
    hub_rules: ClassVar[KeyRules | None] = (
        *(Llava.hub_rules or ()),
        (re.compile(r"^model\.image_newline$"), "image_newline"),
    )
    newline_path: ClassVar[str | None] = "model.image_newline"
    most: int | None = None

    @classmethod
    def kind_of(cls, config: Any) -> type[Llava]:
        return cls

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.visual_tokens = None
        self.side = self.tile_px // self.vision.patch_size
        if self.tile_tokens != self.side**2:
            raise CheckpointError(
                f"vision_feature_select_strategy: expected what leaves the {self.side**2} patches of a tile, got"
                f" {config.vision_feature_select_strategy}, which leaves {self.tile_tokens} rows"
            )
        sizes = [tuple(size) for size in config.image_grid_pinpoints]
        if not sizes or any(len(size) != 2 or side % self.tile_px or side < 1 for size in sizes for side in size):
            raise CheckpointError(
                f"image_grid_pinpoints: expected pairs of multiples of {self.tile_px}, got"
                f" {config.image_grid_pinpoints}"
            )
        self.resolutions: tuple[tuple[int, int], ...] = tuple(sizes)  # type: ignore[arg-type]
        self.dims |= {"resolutions": [list(size) for size in self.resolutions]}

    # images

    def lines(self, grid: PatchGrid) -> Lines:
        """The grid of tiles of an image with `ImageInput.grid`."""
        return lines_of(grid[1], grid[2], self.resolutions, self.tile_px, self.side, self.most)

    def tile_of(self, grid: PatchGrid) -> Tensor:
        """int64 [image tokens]: 0 for the overview, 1 for the grid, -1 for newlines."""
        overview = torch.zeros(self.tile_tokens, dtype=torch.int64)
        if grid[0] == 1:
            return torch.cat([overview, torch.tensor([-1])])
        rows, columns = self.lines(grid).shrunk
        line = torch.cat([torch.ones(columns, dtype=torch.int64), torch.tensor([-1])])
        return torch.cat([overview, line.repeat(rows)])

    def images(self, inputs: Mapping[str, Any]) -> tuple[ImageInput, ...]:
        pixels, sizes, together = (inputs.get(name) for name in ("pixel_values", "image_sizes", "batch_num_images"))
        if pixels is None:
            return ()
        if sizes is None or pixels.ndim not in (4, 5):
            raise UsageError(
                f"image_sizes: expected the height and width of each image beside pixel_values, got {sizes} and pixels"
                f" {list(pixels.shape)}"
            )
        sizes = [(int(height), int(width)) for height, width in sizes.tolist()]
        several = [] if together is None else [int(n) != 1 for n in together.tolist() for _ in range(int(n))]
        counts = [
            1 if number < len(several) and several[number] else 1 + math.prod(self.lines((0, *size)).tiles)
            for number, size in enumerate(sizes)
        ]
        if pixels.ndim == 5:  # padded to the image with most tiles
            parts = [part[:count] for part, count in zip(pixels, counts, strict=True)]
        else:
            parts = list(pixels.split(counts))
        return tuple(ImageInput(part, (count, *size)) for part, count, size in zip(parts, counts, sizes, strict=True))

    def image_tokens(self, image: ImageInput) -> int:
        px = self.tile_px
        if image.grid is None or min(image.grid) < 1:
            raise UsageError(
                f"image: expected tiles, their number, and the image's height and width, got pixels"
                f" {list(image.pixels.shape)} and {image.grid}"
            )
        tiles = 1 if image.grid[0] == 1 else 1 + math.prod(self.lines(image.grid).tiles)
        if tuple(image.pixels.shape) != (tiles, 3, px, px) or image.grid[0] != tiles:
            raise UsageError(
                f"image: expected {tiles} tiles of pixels {[3, px, px]} for a size of {list(image.grid[1:])}, got"
                f" {list(image.pixels.shape)} and {image.grid[0]} tiles"
            )
        return len(self.tile_of(image.grid))

    def shown(self, image: ImageInput) -> list[ImageInfo]:
        assert image.grid is not None
        overview = ImageInfo(image_digest(image.pixels[0]), (self.side, self.side))
        rows, columns = (0, 0) if image.grid[0] == 1 else self.lines(image.grid).shrunk
        if not rows * columns:  # a thread of an image may be thinner than a patch
            return [overview]
        return [overview, ImageInfo(image_digest(image.pixels[1:]), (rows, columns))]

    def encode(self, model: Any, images: Sequence[ImageInput]) -> list[Tensor]:
        weight = submodule_weight(model, self.embed_path)
        features = []
        for image in images:  # a float tower's sums may depend on what else is in a call
            assert image.grid is not None
            more = {} if image.grid[0] > 1 else {"batch_num_images": [2]}  # as an image among several has one tile
            found = model.model.get_image_features(
                image.pixels[None].to(weight), torch.tensor([image.grid[1:]]), return_dict=True, **more
            )
            features.append(found.pooler_output[0].to(weight.dtype).clone())
        return features

    def arranged(self, features: Tensor, grid: PatchGrid | None, newline: Tensor | None) -> Tensor:
        assert grid is not None and newline is not None
        overview, rest = features[: self.tile_tokens], features[self.tile_tokens :]
        newline = newline.to(features)
        if not len(rest):
            return torch.cat([overview, newline[None]])
        lines = self.lines(grid)
        tiles = rest.view(*lines.tiles, self.side, self.side, -1).permute(4, 0, 2, 1, 3)
        whole = tiles.reshape(rest.shape[-1], lines.tiles[0] * self.side, -1)
        inside = whole[:, lines.top : lines.top + lines.shape[0], lines.left : lines.left + lines.shape[1]]
        if lines.shrunk != lines.shape:
            inside = torch.nn.functional.interpolate(inside[None], list(lines.shrunk), mode="bilinear")[0]
        ended = torch.cat([inside, newline[:, None, None].expand(-1, lines.shrunk[0], 1)], -1)
        return torch.cat([overview, ended.flatten(1).T])

    def image_index(self, ids: Tensor, grids: Sequence[PatchGrid | None] = ()) -> ImageIndex:
        shown = ids == self.image_token_id
        layouts = [self.tile_of(grid) for grid in grids if grid is not None]
        dealt = _dealt(shown.sum(-1).tolist(), list(map(len, layouts)))
        image = runs(shown)
        if dealt is None:  # sizes are not known, or fit no such prompt: what reads it says so
            return ImageIndex(image, image)
        tile = image.clone()
        for row, own in enumerate(dealt):
            first = 0
            numbers, tiles = [image[row, :0]], [tile[row, :0]]
            for number, layout in enumerate(layouts[i].to(ids.device) for i in own):
                numbers.append(torch.full_like(layout, number))
                tiles.append(torch.where(layout < 0, layout, layout + first))
                first += int(layout.max()) + 1
            image[row, shown[row]], tile[row, shown[row]] = torch.cat(numbers), torch.cat(tiles)
        return ImageIndex(image, tile)

    # costs

    def vision_macs(self, visual_tokens: int) -> int:
        """As in the base; the tiles are the fewest that give so many tokens."""
        return -(-visual_tokens // self.tile_tokens) * super().vision_macs(self.tile_tokens)

    def pixel_shape(self, visual_tokens: int) -> tuple[tuple[int, ...], PatchGrid | None]:
        """As in the base, for an image that fills one of the resolutions; UsageError where none has so many tokens."""
        known: dict[int, PatchGrid] = {}
        for height, width in self.resolutions:
            grid = (1 + height * width // self.tile_px**2, height, width)
            known.setdefault(int((self.tile_of(grid) >= 0).sum()), grid)
        if visual_tokens not in known:
            raise UsageError(f"visual tokens: expected one of {sorted(known)}, got {visual_tokens}")
        found = known[visual_tokens]
        return (found[0], 3, self.tile_px, self.tile_px), found


def _dealt(tokens: Sequence[int], sizes: Sequence[int]) -> list[range] | None:
    """Numbers of the images that stand in each row, by the row's image tokens and the images' sizes; rows may be
    copies, one below the other. None where they do not fit."""
    copies, rest = divmod(sum(tokens), sum(sizes) or 1)
    if rest or not sizes or not copies or len(tokens) % copies:
        return None
    rows, first = list[range](), 0
    for own in tokens[::copies]:
        end = first
        while end < len(sizes) and sum(sizes[first:end]) < own:
            end += 1
        rows += [range(first, end)] * copies
        first = end
    return rows if [sum(sizes[i] for i in row) for row in rows] == list(tokens) else None
