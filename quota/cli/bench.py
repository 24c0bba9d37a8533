"""`quota bench`: ops beside peers, whole models, and the tables made from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quota.cli.shell import JsonOption, check_writable, notes, print_json

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure this machine: ops beside named peers, whole models, ceilings.",
)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in (text or "").split(","))))


def _numbers(text: str | None, option: str) -> tuple[int, ...]:
    from quota.core.errors import UsageError

    try:
        values = tuple(int(part) for part in _names(text))
    except ValueError:
        values = (0,)
    if any(value < 1 for value in values):
        raise UsageError(f"{option}: expected positive numbers separated by commas, got {text!r}")
    return values


@app.command("ops")
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

        quota bench ops --quick

        quota bench ops --op w4a4_linear --shape llava-1.5-7b.down --m 1,173,640 --peers onednn-w8a8,torch-fp32
    """
    if out is not None:
        check_writable(out)
    from quota.bench import machine
    from quota.bench.run_ops import Selection, chosen_peers, run
    from quota.bench.show import case_table

    selection = Selection(
        _names(op),
        _names(shape),
        _numbers(m, "--m"),
        _names(peers),
        _names(isa),
        _numbers(threads, "--threads"),
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


@app.command("ceiling")
def ceiling(
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads measured together.")] = 1,
    json: JsonOption = False,
) -> None:
    """Measure what this machine can do: multiply-add rates per unit and read bandwidths.

    **Example**

        quota bench ceiling --threads 2
    """
    from quota.bench import roofline

    found = roofline.measure(threads)
    if json:
        gops, bandwidth = (
            {key: rate / 1e9 for key, rate in table.items()} for table in (found.operations, found.bandwidth)
        )
        print_json({"threads": threads, "gops": gops, "gb_per_s": bandwidth})
        return
    for unit, rate in found.operations.items():
        typer.echo(f"{unit:12} {rate / 1e9:8.0f} GOPS")
    for size, rate in found.bandwidth.items():
        typer.echo(f"read {size >> 20:5} MiB {rate / 1e9:6.1f} GB/s")


@app.command("model")
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

        quota bench model --arch embedded --synthetic

        quota bench model --arch llava-1.5-7b --synthetic --out /data/models --floats bfloat16
    """
    from rich.console import Console
    from rich.progress import Progress

    from quota.bench.run_model import Request, ensure_checkpoint, run
    from quota.bench.show import model_table
    from quota.cli.shell import check_keep
    from quota.core.errors import UsageError

    if not synthetic:
        raise UsageError(
            "--synthetic: expected the option; weights of a full-size model are random here, `quota eval` measures real"
            " checkpoints"
        )
    check_writable(out / "checkpoint", "--out")
    wanted = Request(
        arch, out, check_keep(keep), layers, tuple(f for f in _names(floats) if f != "none"), threads, requests, again
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


@app.command("tables")
def tables() -> None:
    """Fill the tables of benchmarks/README.md, docs and SECURITY.md from benchmarks/results (run it at the root of the
    repository).

    **Example**

        quota bench tables
    """
    from quota.bench.tables import PAGE, write
    from quota.core.errors import UsageError

    if not PAGE.is_file():
        raise UsageError(f"{PAGE}: not found; run this at the root of the repository")
    for path in write():
        typer.echo(f"filled {path}")
