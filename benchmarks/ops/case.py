"""A case: one op on one shape, and who runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.timing import Contender


@dataclass(frozen=True)
class Skipped:
    """A peer that was not timed, and why."""

    op: str
    shape: str
    peer: str
    reason: str


@dataclass(frozen=True)
class Case:
    """operations: of one call, a multiply-add counting two. contenders: prepares and checks everybody, the expensive
    part."""

    op: str
    shape: str
    size: dict[str, int]
    operations: float
    cold: bool
    contenders: Callable[[], tuple[list[Contender], list[Skipped]]]

    @property
    def facts(self) -> dict[str, Any]:
        """The columns that name the case."""
        return {"op": self.op, "shape": self.shape, "size": self.size, "weights": "cold" if self.cold else "resident"}

    def title(self) -> str:
        size = " ".join(f"{name.upper()}={value}" for name, value in self.size.items())
        return f"{self.op} {self.shape} {size}{', caches emptied before every call' if self.cold else ''}"
