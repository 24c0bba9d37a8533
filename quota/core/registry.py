"""A table of implementations per op. The first supported one wins; `QUOTA_IMPL` forces one, with the reason when it cannot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from quota.core.env import forced_implementations
from quota.core.errors import UsageError


@dataclass(frozen=True)
class Implementation:
    """`why_not()` is None where the implementation can run, else the reason it cannot."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[[], str | None]


def _always() -> str | None:
    return None


class Op:
    """A named op: its reference and the implementations in order of preference. Calling it runs the chosen one."""

    _table: ClassVar[dict[str, Op]] = {}

    def __init__(self, name: str, reference: Callable[..., Any]) -> None:
        self.name, self.__doc__ = name, reference.__doc__
        self.implementations = [Implementation("ref", reference, _always)]
        self._chosen: Implementation | None = None
        Op._table[name] = self

    def add(self, name: str, run: Callable[..., Any], why_not: Callable[[], str | None] = _always) -> None:
        """Register an implementation preferred over those before it."""
        self.implementations.insert(0, Implementation(name, run, why_not))
        self._chosen = None

    def choose(self) -> Implementation:
        """The implementation to run; bound at the first call and kept."""
        if self._chosen is None:
            forced = forced_implementations()
            unknown = [op for op in forced if op not in Op._table]
            if unknown:
                raise UsageError(f"QUOTA_IMPL: unknown op {unknown[0]!r}; expected one of {', '.join(sorted(Op._table))}")
            if self.name in forced:
                self._chosen = self._named(forced[self.name])
            else:
                self._chosen = next(i for i in self.implementations if i.why_not() is None)
        return self._chosen

    def _named(self, name: str) -> Implementation:
        for implementation in self.implementations:
            if implementation.name == name:
                reason = implementation.why_not()
                if reason:
                    raise UsageError(f"QUOTA_IMPL: {self.name}={name} cannot run here: {reason}")
                return implementation
        raise UsageError(f"QUOTA_IMPL: {self.name} has no implementation {name!r}; expected one of {', '.join(i.name for i in self.implementations)}")

    def rebind(self) -> None:
        """Forget the choice: the next call reads the environment again."""
        self._chosen = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._chosen or self.choose()).run(*args, **kwargs)


def ops() -> dict[str, Op]:
    """Every registered op by name (after `import quota.ops`)."""
    return dict(sorted(Op._table.items()))
