"""The work folder of a calibration (`<out>.partial`): finished blocks, the current streams and a small state file, always consistent after a kill.

Every step reads the streams named in `state.json`, writes new files, and only then replaces `state.json`; files it no longer names are removed after that.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file, save
from torch import Tensor

from quota.calib.stream import Stream
from quota.core.errors import UsageError
from quota.core.files import atomic_write_bytes, atomic_write_text

LOCK = "lock"


class WorkFolder:
    """State of one calibration. `key` identifies everything the result depends on; a folder with another key is discarded."""

    def __init__(self, path: Path, key: str, resume: bool) -> None:
        self.path, self.key = path, key
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(path)
        self.done = 0
        self.reports: list[dict[str, Any]] = []
        self.streams: dict[str, Stream] = {}
        self.notes: dict[str, Any] = {}
        if not (resume and self._load()):
            for old in path.iterdir():
                if old.is_dir():
                    shutil.rmtree(old, ignore_errors=True)
                elif old.name != LOCK:
                    old.unlink()
            (path / "blocks").mkdir()

    def _load(self) -> bool:
        try:
            state = json.loads((self.path / "state.json").read_text())
            if state["key"] != self.key:
                return False
            self.streams = {name: Stream.reopen(self.path, layout) for name, layout in state["streams"].items()}
        except (OSError, ValueError, KeyError):
            return False
        self.done, self.reports, self.notes = state["done"], state["reports"], state["notes"]
        return True

    def stream_path(self, name: str) -> Path:
        """A fresh file name for stream `name` written by the step in progress."""
        return self.path / f"{name}-{self.done + 1:03d}.bin"

    def save_block(self, path: str, tensors: dict[str, Tensor]) -> None:
        """Store the tensors of a finished block."""
        atomic_write_bytes(self._block_file(path), save({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}))

    def load_block(self, path: str) -> dict[str, Tensor]:
        """Tensors of a finished block, sorted by name."""
        tensors = load_file(self._block_file(path))
        return dict(sorted(tensors.items()))

    def commit(self, streams: dict[str, Stream]) -> None:
        """The step in progress is finished: its streams replace the old ones."""
        for stream in streams.values():
            stream.data.flush()
        self.streams, self.done = streams, self.done + 1
        state = {
            "key": self.key, "done": self.done, "reports": self.reports, "notes": self.notes,
            "streams": {name: stream.layout() for name, stream in streams.items()},
        }  # fmt: skip
        atomic_write_text(self.path / "state.json", json.dumps(state))
        used = {stream.path.name for stream in streams.values()}
        for file in self.path.glob("*.bin"):
            if file.name not in used:
                file.unlink()

    def remove(self) -> None:
        """Delete the folder."""
        self.streams = {}
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Let another process work here."""
        self._lock.close()

    def _block_file(self, path: str) -> Path:
        return self.path / "blocks" / f"{path}.safetensors"


def _locked(path: Path) -> IO[bytes]:
    """The folder's lock file, held until it is closed (also by the end of the process). UsageError when another process holds it."""
    file = (path / LOCK).open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UsageError(f"{path}: another calibration is working here; wait for it or choose another output folder") from None
    return file
