"""Finished stages, kept under names made from everything that decides their content."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quota.core.errors import UsageError
from quota.core.files import atomic_write_text

_PACKAGE = Path(__file__).parents[1]
# Rooms that show results or ask for them; the source of every other decides what is computed.
_FACES = frozenset({"bench", "cli", "demo", "lmms", "report", "server", "study"})


def code_fingerprint(package: Path = _PACKAGE) -> str:
    """sha256 over quota's own computing source, so that a changed calibrator is not answered from an old cache."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        if file.relative_to(package).parts[0] not in _FACES:
            digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


@dataclass
class StageCache:
    """Entries `folder/<stage>-<key>`. A stage writes into the path it is given; only a finished one has its `.done`
    file beside it."""

    folder: Path
    common: str  # part of every key
    timings: list[dict[str, Any]] = field(default_factory=list)  # {"stage", "seconds", "reused"} in order

    def path(self, stage: str, parts: dict[str, Any]) -> Path:
        text = json.dumps({"stage": stage, "common": self.common, **parts}, sort_keys=True, default=str)
        return self.folder / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def make(self, stage: str, parts: dict[str, Any], work: Callable[[Path], None]) -> Path:
        """The path of a finished stage; `work(path)` runs when there is none. What an interrupted `work` left stays for
        it to resume."""
        path = self.path(stage, parts)
        done = path.with_name(path.name + ".done")
        began = time.perf_counter()
        reused = done.exists() and path.exists()
        if not reused:
            self.folder.mkdir(parents=True, exist_ok=True)
            work(path)
            seconds = time.perf_counter() - began
            atomic_write_text(done, json.dumps({"seconds": round(seconds, 2)}) + "\n")
        self.timings.append({"stage": stage, "seconds": json.loads(done.read_text())["seconds"], "reused": reused})
        return path


def link(name: Path, target: Path) -> None:
    """`name` becomes a relative link to folder `target`, replacing an older link at once; a copy where links are not
    allowed.

    UsageError when `name` is there and no link.
    """
    if name.exists() and not name.is_symlink():
        raise UsageError(
            f"{name}: expected a link of quota's, found a file or folder of its own; move it away or choose another"
            " --out"
        )
    fresh = name.with_name(f".{name.name}.{secrets.token_hex(4)}")
    try:
        fresh.symlink_to(os.path.relpath(target, name.parent), target_is_directory=True)
    except OSError:
        shutil.copytree(target, name)
        return
    fresh.replace(name)
