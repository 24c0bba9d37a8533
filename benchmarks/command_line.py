"""What the commands of `python -m benchmarks` that are typer functions share."""

from __future__ import annotations

from collections.abc import Callable

import typer

from quota.core.errors import UsageError


def run(command: Callable[..., None], arguments: list[str], prog: str) -> None:
    """Parse `arguments` as the options of `command` and call it; `prog` is its name in help texts."""
    app = typer.Typer(rich_markup_mode="markdown", add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(command)
    app(args=arguments, prog_name=prog)


def names(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in (text or "").split(","))))


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in names(text))
    except ValueError:
        values = (0,)
    if any(value < 1 for value in values):
        raise UsageError(f"{option}: expected positive numbers separated by commas, got {text!r}")
    return values
