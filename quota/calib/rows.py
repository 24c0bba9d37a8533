"""New streams out of old ones, row by row: what the projectors read, and what goes along with a row."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from quota.calib.stream import FloatSource, Stream

Rows = tuple[Tensor, Tensor]  # hidden states [n, width] and what goes along [n, rest]


@torch.no_grad()
def map_rows(stream: Stream, path: Path, change: Callable[[int, Rows], Rows]) -> Stream:
    """A new stream of other rows. change: item and its rows -> the new ones, on the meta device too; their widths are
    those of the first item."""
    shapes = []
    for item, n in enumerate(stream.lengths):
        empty = torch.empty(n, stream.width, device="meta"), torch.empty(n, stream.rest, device="meta")
        shapes.append([tuple(part.shape) for part in change(item, empty)])
    width, rest = [part[1] for part in shapes[0]] if shapes else (stream.width, stream.rest)
    lengths = [first[0] for first, _ in shapes]
    out = stream.like(path, width, None if lengths == stream.lengths else lengths, rest)
    for item in range(len(stream)):
        out.write(item, *change(item, stream.read_rows(item)))
    return out


def select_features(source: FloatSource, stream: Stream, path: Path) -> Stream:
    """What the projectors read of each image: a row per visual token, in raster order."""

    family, module = source.family, lru_cache(source.module)

    def rows(item: int, whole: Rows) -> Rows:
        grid = stream.grids[item] if stream.grids else None
        tapped = whole[1].split(stream.width, -1) if stream.rest else ()
        last = whole[0] if whole[0].is_meta else family.leave_tower(module, whole[0])
        hidden, *others = (family.projector_rows(part.contiguous(), grid) for part in (last, *tapped))
        return hidden, torch.cat(others, -1) if others else hidden[:, :0]

    return map_rows(stream, path, rows)
