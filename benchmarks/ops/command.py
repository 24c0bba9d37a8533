"""`python -m benchmarks ops`: every op beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import command_line
from benchmarks.command_line import names, numbers
from quota.cli.shell import JsonOption, check_writable, notes, print_json


def ops(
    op: Annotated[str | None, typer.Option("--op", help="Only these ops, separated by commas.")] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Only shapes whose names begin so: `llava-1.5-7b`, `clip-l.fc1`.")
    ] = None,
    m: Annotated[str | None, typer.Option("--m", help="Row counts, separated by commas.")] = None,
    peers: Annotated[str | None, typer.Option("--peers", help="Only these peers, or `none`.")] = None,
    isa: Annotated[
        str | None, typer.Option("--isa", help="Instruction sets of ours; default: all but portable.")
    ] = None,
    threads: Annotated[
        str, typer.Option("--threads", help="Thread counts: 1 is judged by CPU time, more by wall time.")
    ] = "1",
    quick: Annotated[
        bool, typer.Option("--quick", help="One shape, three row counts, fewer rounds: half a minute.")
    ] = False,
    again: Annotated[
        bool,
        typer.Option("--again", help="Measure also what the output file already holds for this commit and machine."),
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Append rows to this file, and continue from it.")] = None,
    json: JsonOption = False,
) -> None:
    """Time ops beside other engines, in turns within one run.

    Nothing is timed before it is right: ours must equal the reference bit for bit, a peer must agree with its own
    quantization. Times are medians over rounds; ratios (peer's time / ours, above 1 we are faster) are taken per round,
    then median and quartiles. `% roofline` is against the multiply-add rate and the read bandwidth measured at the
    start.

    **Examples**

        python -m benchmarks ops --quick

        python -m benchmarks ops --op w4a4_linear --shape llava-1.5-7b.down --m 1,173,640 --peers onednn-w8a8,torch-fp32
    """
    if out is not None:
        check_writable(out)
    from benchmarks import machine
    from benchmarks.ops.run import Selection, chosen_peers, run
    from benchmarks.ops.show import case_table

    selection = Selection(
        names(op),
        names(shape),
        numbers(m, "--m"),
        names(peers),
        names(isa),
        numbers(threads, "--threads"),
        quick,
        again,
    )
    console = notes()
    if not machine.idle():
        console.print(
            f"[yellow]load average {machine.load()}: the machine is not idle; CPU times hold, wall times do"
            " not[/yellow]"
        )
    for skipped in (
        chosen_peers(selection.peers)[1]
        if not selection.ops or {"w4a4_linear", "w4a16_linear"} & set(selection.ops)
        else ()
    ):
        console.print(
            f"without {skipped.peer}: {skipped.reason}", style="yellow", markup=False
        )  # "[bench]" is not markup
    made = []
    from rich.console import Console

    table_console = Console(width=max(console.width, 160))
    told: set[str] = set()
    for measured in run(selection, out):
        made += measured.rows
        if json:
            continue
        table_console.print(case_table(measured))
        if measured.reused:
            table_console.print("[dim]measured before; --again measures anew[/dim]")
        for skipped in measured.skipped:
            text = f"{skipped.peer}: {skipped.reason}"
            if text not in told:
                told.add(text)
                console.print(f"skipped: {text} ({skipped.shape})", style="yellow", markup=False)
    if json:
        print_json(made)


def main(arguments: list[str], prog: str) -> None:
    command_line.run(ops, arguments, prog)
