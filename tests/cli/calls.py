"""Calling the command line in this process, and what a refusal looks like."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from quota.cli.main import app


def quota(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def fails(result: Any, *words: str) -> None:
    """Exit status 1, one error line on stderr beside what the libraries log, and it says these words."""
    assert result.exit_code == 1, (result.exit_code, result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0], (word, lines[0])
