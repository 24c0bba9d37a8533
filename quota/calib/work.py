"""The work folder of a calibration (`<out>.partial`): finished blocks, the current streams and a small state file,
always consistent after a kill.

Every step reads the streams of the step before, writes new files, and only then, in the order of the steps, replaces
`state.json`; files that neither it nor a step in progress needs are removed after that. The state vouches for itself
and for every file by SHA-256: what is damaged is computed again, never used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import sys
from collections import deque
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor

from quota.calib.state import BlockReport, FinishedBlock, State, StoredStream, StreamName
from quota.calib.stream import Stream
from quota.core.documents import read_text, shown
from quota.core.errors import CheckpointError, UsageError
from quota.core.files import atomic_write_bytes, atomic_write_text, check_removable, naming, remove_files, sha256_file

LOCK, STATE = "lock", "state.json"
_OWN = re.compile(
    r"lock|state\.json|(float|quantized)-\d+\.bin|blocks/[\w.]+\.safetensors|(blocks/)?\.[\w.]+\.[0-9a-f]{8}"
)  # the last: of a killed write


_STATE_BYTES = 1 << 31  # positions of every token are in it: some 40 bytes each


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
        self.blocks: dict[str, FinishedBlock] = {}  # by module path
        self.streams: dict[StreamName, Stream] = {}  # what the next step reads
        self._handed_on: deque[dict[StreamName, Stream]] = deque()  # by steps that are not committed
        try:
            self._open(resume, overwrite, reuse_blocks)
        except BaseException:
            self.close()
            raise

    def _open(self, resume: bool, overwrite: bool, reuse_blocks: bool) -> None:
        state = self._state(discard=overwrite or not resume)
        if state is not None and not overwrite:
            other = difference(state.job, self.job)
            if other is not None:
                raise UsageError(
                    f"{self.path}: belongs to another calibration ({other}); continue that one with its settings,"
                    " choose another --out, or discard it with --overwrite"
                )
        if state is None or not resume or state.job != self.job:
            self._start_again({})
            return
        self.blocks = {
            path: found for path, found in state.blocks.items() if _digest(self._block_file(path)) == found.sha256
        }
        lost = [f"blocks/{path}.safetensors" for path in state.blocks if path not in self.blocks]
        lost += [stored.file for stored in state.streams.values() if not _is_there(self.path / stored.file, stored)]
        if lost:
            _tell(
                f"{self.path / lost[0]}: damaged or missing; it is computed again"
                + (" (intact blocks are kept)" if reuse_blocks else "")
            )
            self._start_again(self.blocks if reuse_blocks else {})
            return
        self.streams = {name: Stream.reopen(self.path, layout) for name, layout in state.streams.items()}
        self.done = state.done

    def _state(self, discard: bool) -> State | None:
        """What `state.json` says; None when there is none, it is damaged, or it is to be discarded anyway.
        CheckpointError for one that vouches for itself but is not what this class writes."""
        path = self.path / STATE
        try:
            digest, _, body = read_text(path, _STATE_BYTES).partition("\n")
            if digest != hashlib.sha256(body.encode()).hexdigest():
                raise ValueError("its digest is another")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _tell(f"{path}: damaged ({error}); the calibration starts again")
            return None
        try:
            return State.model_validate_json(body, strict=True)
        except ValidationError as error:
            if discard:
                return None
            wrong = error.errors(include_url=False)[0]
            where = ".".join(str(part)[:80] for part in wrong["loc"]) or "the whole"
            raise CheckpointError(
                f"{path}: {where}: {wrong['msg']}, got {shown(wrong['input'])}; this quota did not write it, start"
                " again with --fresh"
            ) from None

    def _start_again(self, blocks: dict[str, FinishedBlock]) -> None:
        kept = {Path(LOCK), *(self._block_file(path).relative_to(self.path) for path in blocks)}
        remove_files(self.path, lambda file: _owns(file) and file not in kept)
        self.blocks = blocks
        self._write_state({})

    def stream_path(self, name: StreamName) -> Path:
        """A fresh file name for stream `name` written by the step in progress."""
        return self.path / f"{name}-{self.done + len(self._handed_on) + 1:03d}.bin"

    def save_block(self, path: str, tensors: dict[str, Tensor], report: BlockReport | None) -> None:
        """Store the tensors of a finished block and, where it was measured, what calibration did to it."""
        data = save({name: tensor.contiguous() for name, tensor in sorted(tensors.items())})
        atomic_write_bytes(self._block_file(path), data)
        self.blocks[path] = FinishedBlock(sha256=hashlib.sha256(data).hexdigest(), report=report)

    def report(self, path: str) -> dict[str, Any]:
        """What calibration did to a finished block, as a manifest tells it; its name alone where nothing was
        measured."""
        found = self.blocks[path].report
        return {"name": path} if found is None else found.to_dict()

    def load_block(self, path: str) -> dict[str, Tensor]:
        """Tensors of a finished block, sorted by name. CheckpointError when the file was altered since."""
        data = self._block_file(path).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.blocks[path].sha256:
            raise CheckpointError(
                f"{self._block_file(path)}: altered while the calibration ran; run the same command again, which"
                " computes it again"
            )
        return dict(sorted(load(data).items()))

    def hand_on(self, streams: dict[StreamName, Stream]) -> None:
        """The step in progress leaves these to the next, which may begin before the step is committed."""
        self.streams = streams
        self._handed_on.append(streams)

    def commit(self) -> None:
        """The first step that is not committed is finished: its streams replace those it read."""
        streams = self._handed_on.popleft()
        for stream in streams.values():
            stream.flush()
        self.done += 1
        self._write_state(streams)
        used = {stream.path.name for left in (streams, *self._handed_on) for stream in left.values()}
        remove_files(self.path, lambda file: file.suffix == ".bin" and _owns(file) and file.name not in used)

    def _write_state(self, left: dict[StreamName, Stream]) -> None:
        streams = {
            name: StoredStream(**stream.layout().model_dump(), sha256=sha256_file(stream.path))
            for name, stream in left.items()
        }
        state = State(job=self.job, done=self.done, blocks=self.blocks, streams=streams)
        body = json.dumps(state.model_dump())
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


def _is_there(file: Path, stored: StoredStream) -> bool:
    return _digest(file) == stored.sha256 and file.stat().st_size == stored.bytes


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
