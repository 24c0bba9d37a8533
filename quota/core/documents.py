"""Reading JSON from other programs: bounded in size and depth, and only from ordinary files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

MOST_BYTES = 64 * 1024**2  # manifests hold a report per block; the largest seen are below 1 MiB
_PIECE_BYTES = 1 << 20


def read_text(path: str | Path, most_bytes: int = MOST_BYTES) -> str:
    """A UTF-8 file of at most `most_bytes`, with or without a byte order mark.

    OSError when it cannot be opened; ValueError for a device, a pipe (opening one does not wait for a writer), a larger
    file, or other bytes.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is not a regular file")
        data = read_some(file, most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None


def read_some(file: IO[bytes], most_bytes: int) -> bytes:
    """Up to `most_bytes` from here. `file.read(most_bytes)` takes all of that memory before the first byte."""
    data = bytearray()
    while piece := file.read(min(_PIECE_BYTES, most_bytes - len(data))):
        data += piece
    return bytes(data)


def read_object(path: str | Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file. OSError as of `read_text`; ValueError when it is anything else, nested too deeply
    included."""
    try:
        data = json.loads(read_text(path, most_bytes))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, got {type(data).__name__}")
    return data


def shown(value: object, most: int = 80) -> str:
    """`repr` of a foreign value, cut so that a message stays one line; never fails, whatever the value's size."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (list, dict, tuple)) and len(value) > 8:
        return f"{type(value).__name__} of {len(value)} entries"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return type(value).__name__
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
