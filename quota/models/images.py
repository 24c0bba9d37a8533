"""Where in which picture every visual token of a prompt lies, and what names a picture's content."""

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
class Shown:
    """A picture the vision tower has seen. digest: depends on its pixels alone. grid: of its visual tokens; None for a
    square."""

    digest: str
    grid: Grid | None = None


@dataclass(frozen=True)
class Pictures:
    """Visual tokens of a batch of prompts. number, place int64 [B, S]: which of the row's pictures, and the place in
    its raster; 0 for text.

    grids and digests: per row and picture; no digests where no pixels were seen.
    """

    number: Tensor
    place: Tensor
    grids: list[list[Grid]]
    digests: list[list[str]] | None = None

    @classmethod
    def of(cls, picture: Tensor, shown: Sequence[Shown] | None = None) -> Pictures:
        """picture int64 [B, S]: 0, 1, ... in prompt order, -1 for text. shown: in order; of one copy where rows were
        repeated (beams).

        A picture of unknown grid that is no square counts as one row of tokens.
        """
        sizes = [row[row >= 0].bincount().tolist() for row in picture]
        place = torch.zeros_like(picture)
        for number in range(max(map(len, sizes), default=0)):
            own = picture == number
            place = torch.where(own, own.long().cumsum(-1) - 1, place)
        spread = None if shown is None else _spread(shown, [len(row) for row in sizes])
        known = spread or [[Shown("")] * len(row) for row in sizes]
        grids = [
            [seen.grid or _square(n) for seen, n in zip(row, counts, strict=True)]
            for row, counts in zip(known, sizes, strict=True)
        ]
        return cls(
            picture.clamp_min(0),
            place,
            grids,
            None if spread is None else [[seen.digest for seen in row] for row in spread],
        )


def _square(tokens: int) -> Grid:
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else (1, tokens)


def _spread(shown: Sequence[Shown], counts: list[int]) -> list[list[Shown]]:
    total = sum(counts)
    copies, rest = divmod(total, len(shown)) if shown else (0, total)
    if rest or (total and not copies):
        raise UsageError(
            f"pixel_values: the prompt has {total} pictures, {len(shown)} were encoded; this selection needs the pixels"
            " of each"
        )
    if not total:
        return [[] for _ in counts]
    given, out = iter(shown), []
    for row in counts[::copies]:
        own = [next(given) for _ in range(row)]
        out.extend([own] * copies)
    return out


def shown_pictures(pixels: Tensor, grids: Tensor | None = None, merge: int = 1) -> list[Shown]:
    """What `pixels` show. pixel_values [N, ...], a picture each; or, with `grids` int64 [N, 3] (frames, rows and
    columns of patches, `merge` x `merge` of which make a visual token), [patches of all pictures, patch]."""
    if grids is None:
        return [Shown(picture_digest(picture)) for picture in pixels]
    parts = pixels.split(grids.prod(-1).tolist())
    return [
        Shown(picture_digest(part), (t * h // merge, w // merge))
        for part, (t, h, w) in zip(parts, grids.tolist(), strict=True)
    ]


def picture_digest(pixels: Tensor) -> str:
    """A text that names the content of one picture's pixel_values; the same for every float dtype the model may run
    in."""
    rounded = pixels.detach().to(torch.bfloat16).view(torch.int16).cpu().contiguous().numpy()
    return hashlib.blake2b(rounded.tobytes(), digest_size=16).hexdigest()
