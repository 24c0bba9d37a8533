"""Where in which image every visual token of a prompt lies, and what names an image's content."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quota.core.errors import UsageError

Grid = tuple[int, int]  # rows, columns
PatchGrid = tuple[int, int, int]  # frames, rows, columns of patches; tiles, height, width of an image cut into tiles


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image as the processor made it, with the three numbers that say how many tokens it becomes and where they
    lie. pixels: [3, height, width], no grid, where every image has one size; [patches, patch] with its grid of patches
    where resolution is dynamic; [tiles, 3, height, width] of an image cut into tiles, with their number and the image's
    own height and width."""

    pixels: Tensor
    grid: PatchGrid | None = None


class ImageIndex(NamedTuple):
    """Where the images of a batch of prompts stand, int64 [B, S] each. image: of which image of its row a token holds
    the features (0, 1, ...), -1 for words. tile: in which raster of visual tokens it lies, counted through the row: an
    image is one raster, or several where it is shown in tiles; -1 for words and for tokens that only end a line of an
    image, which are text to every selection."""

    image: Tensor
    tile: Tensor

    @property
    def visual(self) -> Tensor:
        """bool [B, S]: the visual tokens."""
        return self.tile >= 0

    def sets(self, reference: str) -> Tensor:
        """int64 [B, S]: the set in which a token competes under a recipe's `reference`, -1 where it is not visual."""
        if reference == "recorded":
            return self.tile.clamp_max(0)
        return self.tile if reference == "per_tile" else self.image.masked_fill(self.tile < 0, -1)

    def where(self, real: Tensor) -> ImageIndex:
        """real bool [B, S]: everything else is words."""
        return ImageIndex(self.image.masked_fill(~real, -1), self.tile.masked_fill(~real, -1))


def runs(shown: Tensor) -> Tensor:
    """bool [B, S] -> int64 [B, S]: tokens side by side have one number (0, 1, ... in a row), all others -1."""
    begins = shown & ~torch.cat([torch.zeros_like(shown[:, :1]), shown[:, :-1]], -1)
    return (begins.long().cumsum(-1) - 1).masked_fill(~shown, -1)


@dataclass(frozen=True)
class ImageInfo:
    """A raster that the vision tower has seen: an image, or one of its tiles. digest: depends on its pixels alone.
    grid: of its visual tokens; None for a square."""

    digest: str
    grid: Grid | None = None


@dataclass(frozen=True)
class ImageTokens:
    """Visual tokens of a batch of prompts. number, place int64 [B, S]: which of the row's rasters (`ImageIndex.tile`),
    and the place in it; 0 for text.

    grids and digests: per row and raster; no digests where no pixels were seen.
    """

    number: Tensor
    place: Tensor
    grids: list[list[Grid]]
    digests: list[list[str]] | None = None

    @classmethod
    def of(cls, tile: Tensor, shown: Sequence[ImageInfo] | None = None) -> ImageTokens:
        """tile int64 [B, S]: 0, 1, ... in prompt order, -1 for text. shown: in order; of one copy where
        rows were repeated (beams).

        A raster of unknown grid that is no square counts as one row of tokens.
        """
        sizes = [row[row >= 0].bincount().tolist() for row in tile]
        place = torch.zeros_like(tile)
        for number in range(max(map(len, sizes), default=0)):
            own = tile == number
            place = torch.where(own, own.long().cumsum(-1) - 1, place)
        spread = None if shown is None else _spread(shown, [len(row) for row in sizes])
        known = spread or [[ImageInfo("")] * len(row) for row in sizes]
        grids = [
            [seen.grid or _square(n) for seen, n in zip(row, counts, strict=True)]
            for row, counts in zip(known, sizes, strict=True)
        ]
        return cls(
            tile.clamp_min(0),
            place,
            grids,
            None if spread is None else [[seen.digest for seen in row] for row in spread],
        )


def _square(tokens: int) -> Grid:
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else (1, tokens)


def _spread(shown: Sequence[ImageInfo], counts: list[int]) -> list[list[ImageInfo]]:
    total = sum(counts)
    copies, rest = divmod(total, len(shown)) if shown else (0, total)
    if rest or (total and not copies):
        raise UsageError(
            f"pixel_values: the prompt has {total} images, {len(shown)} were encoded; this selection needs the pixels"
            " of each"
        )
    if not total:
        return [[] for _ in counts]
    given, out = iter(shown), []
    for row in counts[::copies]:
        own = [next(given) for _ in range(row)]
        out.extend([own] * copies)
    return out


def image_digest(pixels: Tensor) -> str:
    """A text that names the content of one image's pixel_values; the same for every float dtype the model may run
    in."""
    rounded = pixels.detach().to(torch.bfloat16).view(torch.int16).cpu().contiguous().numpy()
    return hashlib.blake2b(rounded.tobytes(), digest_size=16).hexdigest()
