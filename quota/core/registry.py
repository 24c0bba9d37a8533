"""A table of implementations per op. The first that supports the device wins; `QUOTA_IMPL` forces one, with the reason
when it cannot run.

On a GPU the reference runs only where it is forced: it computes in float64 and waits for the device, thousands of times
slower, and would not say so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from quota.core.env import forced_implementations
from quota.core.errors import UsageError


@dataclass(frozen=True)
class Context:
    """Where an op is asked to run. device: torch's type of device, "cpu" or "cuda"; index: which of them."""

    device: str = "cpu"
    index: int = 0


HOST = Context()


@dataclass(frozen=True)
class Implementation:
    """`supports(ctx)` is None where the implementation can run, else the reason it cannot."""

    name: str
    run: Callable[..., Any]
    supports: Callable[[Context], str | None]


def _everywhere(ctx: Context) -> str | None:
    return None


class Backend(Protocol):
    """A module of implementations: each is a function with the name of its op."""

    __name__: str

    def supports(self, ctx: Context) -> str | None:
        """As `Implementation.supports`."""


class Op:
    """`name = Op(name_ref, first, second)`: an op, its reference and the backends in order of preference; the reference
    comes last and runs everywhere.

    Calling it runs the first implementation that supports the device of the first argument, a tensor or a tuple of
    tensors (elsewhere the CPU's).
    """

    _table: ClassVar[dict[str, Op]] = {}

    def __init__(self, reference: Callable[..., Any], *backends: Backend) -> None:
        self.name, self.__doc__ = reference.__name__.removesuffix("_ref"), reference.__doc__
        offered = [
            Implementation(backend.__name__.rpartition(".")[2], getattr(backend, self.name), backend.supports)
            for backend in backends
        ]
        self.implementations = [*offered, Implementation("ref", reference, _everywhere)]
        self._chosen: dict[Any, Implementation] = {}  # by torch.device
        Op._table[self.name] = self

    def choose(self, ctx: Context = HOST) -> Implementation:
        """The implementation to run. UsageError for a wrong QUOTA_IMPL, and on a GPU where there is only the reference,
        with the reasons."""
        forced = forced_implementations()
        unknown = [op for op in forced if op not in Op._table]
        if unknown:
            raise UsageError(f"QUOTA_IMPL: unknown op {unknown[0]!r}; expected one of {', '.join(sorted(Op._table))}")
        if self.name in forced:
            return self._named(forced[self.name], ctx)
        chosen = next(i for i in self.implementations if i.supports(ctx) is None)
        if ctx.device == "cuda" and chosen is self.implementations[-1]:
            raise UsageError(
                f"device: cuda:{ctx.index} has no implementation of {self.name} ({self.reasons(ctx)}); install triton,"
                " build the CUDA library (docs/cuda.md), use the CPU, or force the reference with"
                f" QUOTA_IMPL={self.name}=ref"
            )
        return chosen

    def reasons(self, ctx: Context) -> str:
        """Why each implementation that cannot run in `ctx` cannot."""
        return (
            "; ".join(f"{i.name}: {reason}" for i in self.implementations if (reason := i.supports(ctx)))
            or "none is registered"
        )

    def _named(self, name: str, ctx: Context) -> Implementation:
        for implementation in self.implementations:
            if implementation.name == name:
                reason = implementation.supports(ctx)
                if reason:
                    raise UsageError(f"QUOTA_IMPL: {self.name}={name} cannot run here: {reason}")
                return implementation
        raise UsageError(
            f"QUOTA_IMPL: {self.name} has no implementation {name!r}; expected one of"
            f" {', '.join(i.name for i in self.implementations)}"
        )

    def rebind(self) -> None:
        """Forget the choices: the next call reads the environment again."""
        self._chosen = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0][0] if type(args[0]) is tuple else args[0]
        device = getattr(first, "device", None)
        chosen = self._chosen.get(device)
        if chosen is None:  # bound at the first call on a device and kept
            ctx = HOST if device is None else Context(device.type, device.index or 0)
            chosen = self._chosen[device] = self.choose(ctx)
        return chosen.run(*args, **kwargs)


def ops() -> dict[str, Op]:
    """Every registered op by name (after `import quota.ops`)."""
    return dict(sorted(Op._table.items()))
