"""What a run of the GPU check is given, and what its sections hand back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Line = dict[str, Any]
"""One of {"facts": {...}}, {"row": {...}}, {"failure": "..."}; a section's process prints each as it comes, so that a
cut-off keeps all before it."""


@dataclass(frozen=True)
class Options:
    """dry: no GPU. seed: of all random inputs. small: the sizes of the sanitizer. poison: fill new tensors, or leave
    them as the allocator gives them."""

    dry: bool
    seed: int
    small: bool = False
    poison: bool = True
    reuse: bool = False


def facts(**found: Any) -> Line:
    return {"facts": found}


def failure(text: str) -> Line:
    return {"failure": text}


def collected(lines: Iterator[Line] | list[Line]) -> dict[str, Any]:
    """Facts side by side, "rows" and "failures" in order; the last two only where there are any."""
    found: dict[str, Any] = {}
    for line in lines:
        found.update(line.get("facts", {}))
        for name, key in (("row", "rows"), ("failure", "failures")):
            if name in line:
                found.setdefault(key, []).append(line[name])
    return found
