"""Where in which image every visual token of a prompt lies, and what names an image's content."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quota.core.errors import UsageError

Grid = tuple[int, int]  # rows, columns
PatchGrid = tuple[int, int, int]  # frames, rows, columns of patches


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image as the processor made it. pixels: [3, height, width], or [patches, patch] with its grid of patches
    where resolution is dynamic."""

    pixels: Tensor
    grid: PatchGrid | None = None


@dataclass(frozen=True)
class ImageInfo:
    """An image the vision tower has seen. digest: depends on its pixels alone. grid: of its visual tokens; None for a
    square."""

    digest: str
    grid: Grid | None = None


@dataclass(frozen=True)
class ImageTokens:
    """Visual tokens of a batch of prompts. number, place int64 [B, S]: which of the row's images, and the place in
    its raster; 0 for text.

    grids and digests: per row and image; no digests where no pixels were seen.
    """

    number: Tensor
    place: Tensor
    grids: list[list[Grid]]
    digests: list[list[str]] | None = None

    @classmethod
    def of(cls, image_index: Tensor, shown: Sequence[ImageInfo] | None = None) -> ImageTokens:
        """image_index int64 [B, S]: 0, 1, ... in prompt order, -1 for text. shown: in order; of one copy where
        rows were repeated (beams).

        An image of unknown grid that is no square counts as one row of tokens.
        """
        sizes = [row[row >= 0].bincount().tolist() for row in image_index]
        place = torch.zeros_like(image_index)
        for number in range(max(map(len, sizes), default=0)):
            own = image_index == number
            place = torch.where(own, own.long().cumsum(-1) - 1, place)
        spread = None if shown is None else _spread(shown, [len(row) for row in sizes])
        known = spread or [[ImageInfo("")] * len(row) for row in sizes]
        grids = [
            [seen.grid or _square(n) for seen, n in zip(row, counts, strict=True)]
            for row, counts in zip(known, sizes, strict=True)
        ]
        return cls(
            image_index.clamp_min(0),
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
