"""Where in which picture every visual token of a prompt lies, and what names a picture's content."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quota.core.errors import UsageError


@dataclass(frozen=True)
class Pictures:
    """Visual tokens of a batch of prompts. number, place int64 [B, S]: the row's how-maniest picture, and the place in its raster; 0 for text.

    grids: per row and picture (rows, columns). digests: per row and picture a text that depends on the pixels alone, or None where no
    pixels were seen.
    """

    number: Tensor
    place: Tensor
    grids: list[list[tuple[int, int]]]
    digests: list[list[str]] | None = None

    @classmethod
    def equal(cls, visual: Tensor, tokens: int, digests: Sequence[str] | None = None) -> Pictures:
        """All pictures have `tokens` tokens (LLaVA); visual [B, S] bool. A picture that is no square counts as one row of tokens.

        digests: of the pictures in prompt order; of one copy where rows were repeated (beams).
        """
        ordinal = torch.where(visual, visual.long().cumsum(-1) - 1, 0)
        side = math.isqrt(tokens)
        grid = (side, side) if side * side == tokens else (1, tokens)
        counts = [-(-count // tokens) for count in visual.sum(-1).tolist()]
        return cls(ordinal // tokens, ordinal % tokens, [[grid] * n for n in counts], None if digests is None else _spread(digests, counts))


def _spread(digests: Sequence[str], counts: list[int]) -> list[list[str]]:
    total = sum(counts)
    copies, rest = divmod(total, len(digests)) if digests else (0, total)
    if rest or (total and not copies):
        raise UsageError(f"pixel_values: the prompt has {total} pictures, {len(digests)} were encoded; the random score needs the pixels of each")
    if not total:
        return [[] for _ in counts]
    given, out = iter(digests), []
    for row in counts[::copies]:
        own = [next(given) for _ in range(row)]
        out.extend([own] * copies)
    return out


def picture_digests(pixels: Tensor) -> list[str]:
    """pixel_values [N, C, H, W] -> one text per picture; the same for every float dtype the model may run in."""
    rounded = pixels.detach().to(torch.bfloat16).view(torch.int16).cpu().contiguous().numpy()
    return [hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest() for picture in rounded]
