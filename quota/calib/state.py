"""What a calibration keeps on the disk between its steps, typed: read back strictly, so that a file which is not what
`quota.calib.work` wrote is refused before anything is done with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import FailFast, Field, model_validator

from quota.core.schema import Document

StreamName = Literal["float", "quantized"]

_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Place = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Item = TypeVar("_Item")
_Many = Annotated[list[_Item], FailFast()]  # else every wrong item of a million would be an error of its own


@dataclass(frozen=True)
class BlockReport:
    """What calibration did to one block, on the held-out samples.

    mse_rtn: rounding to nearest without transforms (before); mse_start: after the searched start; mse: the exported
    integers (after). sqnr_db: output signal over the error of the exported integers. update_sqnr_db: the same for what
    the block adds to the residual stream (equal to sqnr_db for the projector). best_step: optimiser step of the kept
    iterate, 0 = the start.
    """

    name: str
    mse_rtn: float
    mse_start: float
    mse: float
    sqnr_db: float
    update_sqnr_db: float
    best_step: int
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, floats rounded to 6 significant digits so that reports are stable."""
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(self).items()}


class FinishedBlock(Document):
    """sha256: of the block's file. report: None where there are no samples, so nothing was measured."""

    sha256: _Digest
    report: BlockReport | None


class StreamLayout(Document):
    """A `quota.calib.stream.Stream` without its rows."""

    file: str
    width: Annotated[int, Field(ge=1, lt=2**31)]
    rest: _Count
    dtype: Literal["float32", "float16"]
    lengths: _Many[_Count]
    positions: _Many[_Place | tuple[_Place, _Place, _Place]]
    roles: _Many[Annotated[int, Field(ge=0, le=2)]]
    columns: _Many[_Place]
    drops: _Many[Annotated[int, Field(ge=0, le=1)]]
    grids: _Many[tuple[_Count, _Count, _Count]]

    @model_validator(mode="after")
    def _rows_agree(self) -> StreamLayout:
        for name in ("positions", "roles", "columns", "drops"):
            if len(getattr(self, name)) != sum(self.lengths):
                raise ValueError(f"{name}: expected {sum(self.lengths)} rows")
        if len(set(map(type, self.positions))) > 1:
            raise ValueError("positions: expected numbers alone, or triples alone")
        if len(self.grids) not in (0, len(self.lengths)):
            raise ValueError(f"grids: expected {len(self.lengths)} items")
        return self

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return sum(self.lengths) * (self.width + self.rest) * np.dtype(self.dtype).itemsize


class StoredStream(StreamLayout):
    """A stream of a work folder: its file has one of the folder's own names, and this SHA-256."""

    file: Annotated[str, Field(pattern=r"^(float|quantized)-\d+\.bin$")]
    sha256: _Digest


class State(Document):
    """job: everything the result depends on. done: finished steps. blocks: by module path. streams: what the next step
    reads, "float" and, where blocks learn from quantized inputs, "quantized"."""

    job: dict[str, Any]
    done: _Count
    blocks: dict[Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")], FinishedBlock]
    streams: dict[StreamName, StoredStream]
