"""`python -m benchmarks`: every command explains itself, errors are one line, and the GPU's needs torch alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import COMMANDS, main, overview

ROOT = Path(__file__).parents[2]


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    assert capsys.readouterr().out == 2 * overview()
    assert all(f"  {name} " in overview() for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*name.split(), "--help"])
    assert not left.value.code
    assert f"python -m benchmarks {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nothing"], 2, "error: expected one of ops, "),
        (["serve"], 2, "error: expected one of ops, "),
        (["ops", "--m", "0"], 1, "error: --m: expected positive numbers"),
        (["model", "--arch", "embedded"], 1, "error: --synthetic: expected the option"),
    ],
)
def test_a_wrong_command_is_one_line(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert error.startswith(words) and error.count("\n") == 1


def test_the_gpu_check_starts_without_typer_and_pydantic() -> None:
    """A CUDA image has torch and transformers, not always these."""
    code = (
        "import runpy, sys; sys.modules |= dict.fromkeys(('typer', 'pydantic', 'rich')); sys.argv = ['', 'gpu',"
        " '--help']; runpy.run_module('benchmarks', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--sections" in done.stdout, done.stderr
