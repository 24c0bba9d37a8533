"""The work folder of a calibration (`<out>.partial`): finished blocks, the current streams and a small state file,
always consistent after a kill.

Every step reads the streams named in `state.json`, writes new files, and only then replaces `state.json`; files it no
longer names are removed after that. The state vouches for itself and for every file by SHA-256: what is damaged is
computed again, never used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar

from pydantic import FailFast, Field, ValidationError, model_validator
from safetensors.torch import load, save
from torch import Tensor

from quota.calib.stream import Stream
from quota.core.documents import read_text, shown
from quota.core.errors import CheckpointError, UsageError
from quota.core.files import atomic_write_bytes, atomic_write_text, check_removable, naming, remove_files, sha256_file
from quota.core.schema import Document

LOCK, STATE = "lock", "state.json"
_OWN = re.compile(
    r"lock|state\.json|(float|quantized)-\d+\.bin|blocks/[\w.]+\.safetensors|(blocks/)?\.[\w.]+\.[0-9a-f]{8}"
)  # the last: of a killed write


_STATE_BYTES = 1 << 31  # positions of every token are in it: some 40 bytes each
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_BlockPath = Annotated[str, Field(pattern=r"^[\w.]+$")]
_Patches = tuple[int, int, int]
_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Item = TypeVar("_Item")
_Many = Annotated[list[_Item], FailFast()]  # else every wrong item of a million would be an error of its own
_Counts = _Many[_Count]


class _Block(Document):
    sha256: _Digest
    report: dict[str, Any]


class _Layout(Document):
    """`Stream.layout` and the file's digest."""

    file: Annotated[str, Field(pattern=r"^(float|quantized)-\d+\.bin$")]
    width: Annotated[int, Field(ge=1)]
    dtype: Literal["float32", "float16"]
    lengths: _Counts
    positions: _Many[_Count | _Patches]
    roles: _Many[Annotated[int, Field(ge=-128, lt=128)]]
    columns: _Counts
    images: _Many[_Counts]
    grids: _Many[_Patches]
    sha256: _Digest

    @model_validator(mode="after")
    def _fits(self) -> _Layout:
        rows, items = sum(self.lengths), len(self.lengths)
        if {len(self.positions), len(self.roles), len(self.columns)} != {rows} or len(self.images) != items:
            raise ValueError(f"expected positions, roles and columns of {rows} rows and images of {items} items")
        if len(set(map(type, self.positions))) > 1:
            raise ValueError("positions: expected numbers alone, or triples alone")
        return self


class _Notes(Document):
    """What later steps need of earlier ones. shown: per sample and picture its digest and grid of tokens."""

    ids: _Many[_Counts] = Field(default_factory=list)
    grids: _Many[_Patches] = Field(default_factory=list)
    shown: _Many[_Many[tuple[str, tuple[int, int] | None]]] = Field(default_factory=list)
    keep: _Many[_Many[Literal[0, 1]]] = Field(default_factory=list)


class _State(Document):
    job: dict[str, Any]
    done: Annotated[int, Field(ge=0)]
    blocks: dict[_BlockPath, _Block]
    notes: _Notes
    streams: dict[Literal["float", "quantized"], _Layout]


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first setting two calibrations do not share, as "seed is 0 there, 5 here"; None where all that both name are
    equal."""
    for name in (name for name in ours if name in theirs):
        if theirs[name] != ours[name]:
            return f"{name} is {shown(theirs[name])} there, {shown(ours[name])} here"
    return None


class WorkFolder:
    """State of one calibration. `job` names everything the result depends on (JSON values).

    A folder of another job is refused with the setting that differs, or emptied under `overwrite`; a folder of this job
    continues, or is emptied where
    `resume` is off. Files that are not a calibration's are never removed: UsageError.
    reuse_blocks: a finished block depends on the float model alone, so that one damaged file does not cost the others.
    """

    def __init__(
        self,
        path: Path,
        job: dict[str, Any],
        *,
        resume: bool = True,
        overwrite: bool = False,
        reuse_blocks: bool = True,
    ) -> None:
        self.path, self.job = path, json.loads(json.dumps(job))
        check_removable(path, _owns)
        with naming(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(path)
        self.done = 0
        self.blocks: dict[str, dict[str, Any]] = {}  # module path -> {"sha256", "report"}
        self.streams: dict[str, Stream] = {}
        self.notes: dict[str, Any] = {}
        try:
            self._open(resume, overwrite, reuse_blocks)
        except BaseException:
            self.close()
            raise

    def _open(self, resume: bool, overwrite: bool, reuse_blocks: bool) -> None:
        state = self._state()
        if state is not None and not overwrite:
            other = difference(state["job"], self.job)
            if other is not None:
                raise UsageError(
                    f"{self.path}: belongs to another calibration ({other}); continue that one with its settings,"
                    " choose another --out, or discard it with --overwrite"
                )
        if state is None or not resume or state["job"] != self.job:
            self._start_again({})
            return
        self.blocks = {
            path: found for path, found in state["blocks"].items() if _digest(self._block_file(path)) == found["sha256"]
        }
        lost = [f"blocks/{path}.safetensors" for path in state["blocks"] if path not in self.blocks]
        lost += [
            layout["file"]
            for layout in state["streams"].values()
            if _digest(self.path / layout["file"]) != layout["sha256"]
        ]
        if lost:
            _tell(
                f"{self.path / lost[0]}: damaged or missing; it is computed again"
                + (" (intact blocks are kept)" if reuse_blocks else "")
            )
            self._start_again(self.blocks if reuse_blocks else {})
            return
        self.streams = {name: Stream.reopen(self.path, layout) for name, layout in state["streams"].items()}
        self.done, self.notes = state["done"], state["notes"]

    def _state(self) -> dict[str, Any] | None:
        """What `state.json` says, or None when there is none or it is not what this class wrote."""
        path = self.path / STATE
        try:
            digest, _, body = read_text(path, _STATE_BYTES).partition("\n")
            if digest != hashlib.sha256(body.encode()).hexdigest():
                raise ValueError("its digest is another")
            return _State.model_validate_json(body, strict=True).model_dump(exclude_unset=True)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            reason = f"{'.'.join(str(part)[:80] for part in first['loc'])}: {first['msg']}"
        except (OSError, ValueError) as error:
            reason = str(error)
        _tell(f"{path}: damaged ({reason}); the calibration starts again")
        return None

    def _start_again(self, blocks: dict[str, dict[str, Any]]) -> None:
        kept = {Path(LOCK), *(self._block_file(path).relative_to(self.path) for path in blocks)}
        remove_files(self.path, lambda file: _owns(file) and file not in kept)
        self.blocks = blocks
        self._write_state()

    def stream_path(self, name: str) -> Path:
        """A fresh file name for stream `name` written by the step in progress."""
        return self.path / f"{name}-{self.done + 1:03d}.bin"

    def save_block(self, path: str, tensors: dict[str, Tensor], report: dict[str, Any]) -> None:
        """Store the tensors of a finished block and what calibration did to it."""
        data = save({name: tensor.contiguous() for name, tensor in sorted(tensors.items())})
        atomic_write_bytes(self._block_file(path), data)
        self.blocks[path] = {"sha256": hashlib.sha256(data).hexdigest(), "report": report}

    def load_block(self, path: str) -> dict[str, Tensor]:
        """Tensors of a finished block, sorted by name. CheckpointError when the file was altered since."""
        data = self._block_file(path).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.blocks[path]["sha256"]:
            raise CheckpointError(
                f"{self._block_file(path)}: altered while the calibration ran; run the same command again, which"
                " computes it again"
            )
        return dict(sorted(load(data).items()))

    def commit(self, streams: dict[str, Stream]) -> None:
        """The step in progress is finished: its streams replace the old ones."""
        for stream in streams.values():
            stream.flush()
        self.streams, self.done = streams, self.done + 1
        self._write_state()
        used = {stream.path.name for stream in streams.values()}
        remove_files(self.path, lambda file: file.suffix == ".bin" and _owns(file) and file.name not in used)

    def _write_state(self) -> None:
        state = {
            "job": self.job,
            "done": self.done,
            "blocks": self.blocks,
            "notes": self.notes,
            "streams": {
                name: {**stream.layout(), "sha256": sha256_file(stream.path)} for name, stream in self.streams.items()
            },
        }
        body = json.dumps(state)
        atomic_write_text(self.path / STATE, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")

    def bytes(self) -> int:
        """What the folder takes on the disk already."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def remove(self) -> None:
        """Delete what the calibration wrote here, and the folder when nothing else is in it."""
        self.streams = {}
        self.close()
        remove_files(self.path, _owns)

    def close(self) -> None:
        """Let another process work here."""
        self._lock.close()

    def _block_file(self, path: str) -> Path:
        return self.path / "blocks" / f"{path}.safetensors"


def _owns(file: Path) -> bool:
    return _OWN.fullmatch(file.as_posix()) is not None


def _digest(file: Path) -> str | None:
    try:
        return sha256_file(file)
    except OSError:
        return None


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _locked(path: Path) -> IO[bytes]:
    """The folder's lock file, held until it is closed (also by the end of the process). UsageError when another process
    holds it."""
    file = (path / LOCK).open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UsageError(
            f"{path}: another calibration is working here; wait for it or choose another output folder"
        ) from None
    return file
