"""What every verb shares: one-line errors, JSON on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from quota.core.errors import QuotaError, UsageError
from quota.core.files import claim_folder
from quota.core.folders import is_hub_name


class FloatType(StrEnum):
    """Float types a model can compute in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


DeviceOption = Annotated[str, typer.Option("--device", help="Where models run: cpu, cuda or cuda:N.")]
DtypeOption = Annotated[FloatType, typer.Option("--dtype", help="Of everything that is not quantized.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace files that are already there under these names.")
]


def notes() -> Console:
    """Progress and remarks: stderr, so that stdout can be piped."""
    return Console(stderr=True)


def say(text: str = "") -> None:
    typer.echo(text)


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1, default=str))


class ErrorReportingGroup(TyperGroup):
    """Turns the errors a user can cause into one line on stderr and exit status 1 (130 for Ctrl-C); faults of quota
    keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted; run the same command again, which continues where it can", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `quota ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (QuotaError, OSError) as error:
            if os.environ.get("QUOTA_TRACEBACK"):
                raise
            typer.echo(f"error: {describe(error)}", err=True)
            raise typer.Exit(1) from None


def describe(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class BuildByDefaultGroup(TyperGroup):
    """`quota recipe CHECKPOINT ...` is `quota recipe build CHECKPOINT ...`; a checkpoint folder named like a verb is
    `./explain`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["build", *args]
        return super().parse_args(ctx, args)


def check_checkpoint(checkpoint: str, what: str = "CHECKPOINT") -> str:
    """A folder that exists, or something that can be a hub name; UsageError otherwise."""
    path = Path(checkpoint)
    if path.is_file():
        raise UsageError(
            f"{what}: {checkpoint} is a file; expected a checkpoint folder or a hub name such as"
            " llava-hf/llava-1.5-7b-hf"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"{what}: {checkpoint} holds no config.json; expected a checkpoint folder")
    if not path.exists() and not is_hub_name(checkpoint):
        raise UsageError(
            f"{what}: no folder {checkpoint}; expected a checkpoint folder or a hub name such as"
            " llava-hf/llava-1.5-7b-hf"
        )
    return checkpoint


def check_writable(path: Path, what: str = "--out") -> Path:
    """Fails before the work, not after it: the nearest existing parent of `path` must be a folder one can write
    into."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{what}: cannot write {path}: {parent} is not a writable folder")
    return path


def check_output(path: Path, what: str = "--out", *, overwrite: bool = False) -> Path:
    """`check_writable`, for a file that is not there yet: one that is, is replaced only when asked, and only a plain
    file is."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{what}: expected the name of a file, {path} is something else; choose another")
    if path.exists() and not overwrite:
        raise UsageError(
            f"{what}: {path} exists; choose another name, move it away, or give --overwrite where the verb has it"
        )
    return check_writable(path, what)


def check_output_folder(path: Path, what: str = "--out") -> Path:
    """`check_writable`, for a folder of reports: new, empty, or one that quota wrote before (`claim_folder`)."""
    check_writable(path, what)
    return claim_folder(path)


def check_keep(keep: float) -> float:
    if not 0 < keep <= 1:
        raise UsageError(f"--keep: expected a ratio above 0 and at most 1, got {keep:g}")
    return keep
