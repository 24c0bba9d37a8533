"""`python -m benchmarks COMMAND ...`: measure this machine, from a checkout."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NamedTuple

from quota.core.errors import QuotaError


class Command(NamedTuple):
    """module: its `main(arguments, prog)` runs the command, and is imported only then: one needs a GPU, another a
    server, and the machine with the GPU may have neither typer nor pydantic."""

    module: str
    words: str


COMMANDS = {
    "ops": Command("benchmarks.ops.command", "every op beside other engines, in turns within one run"),
    "model": Command("benchmarks.model.command", "a whole model: first token, decoding, memory, disk"),
    "ceiling": Command("benchmarks.ceiling", "multiply-add rates and read bandwidths of this machine"),
    "gpu": Command("benchmarks.gpu.command", "build, check and time the CUDA side (make gpu-check)"),
    "sass": Command("benchmarks.gpu.sass", "registers and instructions of the CUDA kernels; needs no GPU"),
    "serve throughput": Command("benchmarks.serve.throughput", "the server's throughput beside peers"),
    "serve soak": Command("benchmarks.serve.soak", "mixed load for hours, with its accounts"),
    "serve attack": Command("benchmarks.serve.attack", "attacks at full size beside a well-behaved client"),
    "serve fuzz": Command("benchmarks.serve.fuzz", "any bytes into what reads a stranger's"),
}
HELP = """\
usage: python -m benchmarks COMMAND [OPTIONS]

Measure QUOTA on this machine, from a checkout: nothing of this is part of the package.

commands:
{commands}

Each explains itself: python -m benchmarks COMMAND --help. Start with `ops --quick`, half a minute.
Rows go to benchmarks/results; `python -m tools.pages` makes the tables of README, docs and SECURITY.md from them.
"""


def overview() -> str:
    return HELP.format(commands="\n".join(f"  {name:18}{c.words}" for name, c in COMMANDS.items()))


def main(arguments: list[str]) -> int:
    """Exit status: 0, the command's own, 1 for an error one can cause (one line on stderr), 2 for an unknown
    command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview(), end="")
        return 0
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in COMMANDS:
            break
    else:
        print(f"error: expected one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        return 2
    try:
        return import_module(COMMANDS[name].module).main(arguments[length:], f"python -m benchmarks {name}") or 0
    except (QuotaError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
