"""`quota serve` as far as it goes without serving."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from quota.cli.main import app
from quota.cli.serve import parse_bytes
from quota.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"), [("512M", 512 << 20), ("2g", 2 << 30), ("100", 100), ("4K", 4096), (None, None)]
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "0", "many"])
def test_wrong_sizes(text):
    with pytest.raises(UsageError, match="--kv-bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "checkpoint"),
        (["no/such/folder"], "no folder"),
        (["x", "--port", "99999"], "port"),
        (["x", "--config", "none.toml"], "cannot be read"),
        (["x", "--kv-bytes", "lots"], "--kv-bytes"),
    ],
)
def test_refusals_are_one_line(arguments, reason, monkeypatch):
    monkeypatch.delenv("QUOTA_TRACEBACK", raising=False)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert (
        result.exit_code == 1
        and result.output.startswith("error: ")
        and reason in result.output
        and result.output.count("\n") == 1
    )
