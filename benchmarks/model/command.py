"""`python -m benchmarks model`: a whole model beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import command_line
from benchmarks.command_line import names
from quota.cli.shell import JsonOption, check_keep, check_writable, notes, print_json
from quota.core.errors import UsageError


def model(
    arch: Annotated[str, typer.Option("--arch", help="llava-1.5-7b, qwen2.5-vl-7b, 135m, embedded or embedded-qwen.")],
    synthetic: Annotated[
        bool,
        typer.Option(
            "--synthetic", help="Use random weights: the only kind there is; said so that nobody mistakes them."
        ),
    ] = False,
    keep: Annotated[float, typer.Option("--keep", help="Also run pruned to this share of the visual tokens.")] = 0.3,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the checkpoint; one that is there is used again.")
    ] = Path("bench-models"),
    layers: Annotated[int | None, typer.Option("--layers", help="Only the first decoder layers.")] = None,
    floats: Annotated[
        str, typer.Option("--floats", help="Dtypes of transformers' model beside ours, or `none`.")
    ] = "bfloat16,float32",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of every process.")] = 1,
    requests: Annotated[
        int, typer.Option("--requests", min=1, help="Timed requests per variant, after one that warms up.")
    ] = 3,
    results: Annotated[
        Path | None, typer.Option("--results", help="Append rows to this file, and continue from it.")
    ] = None,
    again: Annotated[
        bool,
        typer.Option("--again", help="Measure also what the results file already holds for this commit and machine."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Run a whole model of full size: time to the first token, decoding, memory, disk.

    Makes a checkpoint with random weights (block by block, so memory stays small), then answers an image of 576 visual
    tokens with 64 text tokens by 32 tokens: unpruned, pruned, and with transformers' float model, each in a process of
    its own. Where not all float layers fit in memory, two depths are measured and the rest is added at their time per
    layer.

    **Examples**

        python -m benchmarks model --arch embedded --synthetic

        python -m benchmarks model --arch llava-1.5-7b --synthetic --out /data/models --floats bfloat16
    """
    from rich.console import Console
    from rich.progress import Progress

    from benchmarks.model.run import Request, ensure_checkpoint, run
    from benchmarks.model.show import model_table

    if not synthetic:
        raise UsageError(
            "--synthetic: expected the option; weights of a full-size model are random here, `quota eval` measures real"
            " checkpoints"
        )
    check_writable(out / "checkpoint", "--out")
    wanted = Request(
        arch, out, check_keep(keep), layers, tuple(f for f in names(floats) if f != "none"), threads, requests, again
    )
    with Progress(console=notes(), transient=True) as progress:
        task = progress.add_task(f"making {arch}", total=None)
        checkpoint = ensure_checkpoint(wanted, lambda done, total: progress.update(task, completed=done, total=total))
    made = []
    for row in run(wanted, checkpoint, results):
        made.append(row)
        notes().print(
            f"{row['implementation']}: first token {row['ttft_ms']:.0f} ms, then {row['decode_ms']:.1f} ms each"
        )
    if json:
        print_json(made)
    else:
        Console(width=max(notes().width, 160)).print(model_table(made))


def main(arguments: list[str], prog: str) -> None:
    command_line.run(model, arguments, prog)
