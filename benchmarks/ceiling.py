"""`python -m benchmarks ceiling`: what this machine can do."""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks import command_line, roofline
from quota.cli.shell import JsonOption, print_json


def ceiling(
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads measured together.")] = 1,
    json: JsonOption = False,
) -> None:
    """Measure what this machine can do: multiply-add rates per unit and read bandwidths.

    **Example**

        python -m benchmarks ceiling --threads 2
    """
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


def main(arguments: list[str], prog: str) -> None:
    command_line.run(ceiling, arguments, prog)
