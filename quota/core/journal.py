"""Rows appended to a file of JSON lines, so that long work goes on where it was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quota.core.files import atomic_write_text, naming


class Journal:
    """JSON lines under a header line. `rows` are those already on disk; a file with another header, or a torn last
    line, is not reused."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        good = 0
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not line.endswith("\n") or (good == 0 and row != header):
                break
            if good:
                self.rows.append(row)
            good += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        if good == 0 or good < len(lines):  # start again from the good lines only
            atomic_write_text(path, "".join(lines[:good]) if good else json.dumps(header) + "\n")

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append records; they are on disk when this returns."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows.extend(rows)
