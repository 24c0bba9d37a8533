"""Fuzzing by command, for as long as asked: settings (TOML and variables), bodies through the server's application,
connections that hold theirs, data URLs, images, prompts and stop texts, and files: recipes, manifests, config.json,
samples, the state of a calibration.

    python -m benchmarks serve fuzz --seconds 600 --seed 1 --target image --target chat
    python -m benchmarks serve fuzz --seconds 600 --guided        (needs the package atheris: inputs are chosen by code
    coverage)
    python -m benchmarks serve fuzz --replay runs/fuzz/image-1-20

Each input must be accepted or refused with the error of its kind, within a limit on processor time and memory; a
process of its own takes it, is ended when it passes a limit, and started anew. Anything else is printed with seed and
number, and the input kept in a file; the status is then 1. Memory is limited on Linux.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.serve.fuzz_targets import TARGETS
from quota.core.files import atomic_write_bytes

MIB = 1 << 20
_WALL = 20  # a process that got so little of the processor that this many times its limit have passed is ended too


@dataclass(frozen=True)
class Limits:
    """Of one input: processor seconds; bytes over what the process had when it was ready."""

    seconds: float = 5.0
    memory_bytes: int = 256 * MIB


@dataclass
class Report:
    """inputs: taken, by target. failures: one line each. kept: files with their inputs."""

    inputs: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def _peak_bytes() -> int:
    """Of this process since it began; 0 where the system does not say."""
    if not sys.platform.startswith("linux"):
        return 0
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def _limit_memory(more_bytes: int) -> None:
    """A last bound, far above the limit that is reported, so that the machine survives. Processes started from here may
    set their own."""
    if sys.platform.startswith("linux"):
        import resource

        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        now = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (now + more_bytes, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _work(connection: Connection, names: Sequence[str], limits: Limits, prepare: Callable[[], None] | None) -> None:
    """The process: takes inputs, and answers each with what is wrong, or nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if prepare is not None:
        prepare()
    for name in names:
        TARGETS[name].take(b"{}")  # imports, models
    _limit_memory(8 * limits.memory_bytes)
    start = _peak_bytes()
    connection.send("")
    while True:
        try:
            name, data = connection.recv()
        except EOFError:
            return
        wrong = ""
        signal.setitimer(
            signal.ITIMER_PROF, limits.seconds
        )  # nothing handles SIGPROF, so it ends the process, inside a decoder too
        try:
            TARGETS[name].take(data)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"[:500]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = _peak_bytes() - start
        if not wrong and grown > limits.memory_bytes:
            wrong = f"memory grew by {grown >> 20} MiB, the limit is {limits.memory_bytes >> 20}"
        connection.send(wrong)


class Worker:
    """A process that takes the inputs of these targets. prepare: called there first; a function of a module."""

    def __init__(self, names: Sequence[str], limits: Limits, prepare: Callable[[], None] | None = None) -> None:
        self.names, self.limits, self.prepare = tuple(names), limits, prepare
        self._start()

    def _start(self) -> None:
        self._ended = False
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, self.names, self.limits, self.prepare), daemon=False
        )
        self._process.start()
        theirs.close()
        try:
            self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the process of {self.names} ended with status {self._process.exitcode} before the first input"
            ) from None

    def take(self, name: str, data: bytes) -> str:
        """What is wrong with how the input was taken, or nothing. The input after a failure meets a new process."""
        if self._ended:
            self._start()
        wall_s = _WALL * self.limits.seconds
        try:
            self._connection.send((name, data))
            wrong = str(self._connection.recv()) if self._connection.poll(wall_s) else f"no end within {wall_s:g} s"
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            took = f"took more than {self.limits.seconds:g} s of processor time"
            wrong = took if status == -signal.SIGPROF else f"ended its process with status {status}"
        if wrong:
            self.end()
        return wrong

    def end(self) -> None:
        self._ended = True
        self._connection.close()
        self._process.kill()
        self._process.join()


def fuzz(
    seconds: float,
    seed: int,
    names: Sequence[str] = tuple(TARGETS),
    *,
    inputs: int | None = None,
    limits: Limits = Limits(),
    keep: Path | None = None,
    most: int = 10,
    prepare: Callable[[], None] | None = None,
) -> Report:
    """Inputs number 0, 1, ... of every target in turn, until the time is over, `inputs` of each are taken or `most`
    failed."""
    report, worker = Report(dict.fromkeys(names, 0)), Worker(names, limits, prepare)
    until = time.monotonic() + seconds
    try:
        for number in range(inputs) if inputs is not None else itertools.count():
            for name in names:
                if time.monotonic() > until or len(report.failures) >= most:
                    return report
                data = TARGETS[name].make(random.Random(f"{seed} {number} {name}"))
                report.inputs[name] += 1
                if wrong := worker.take(name, data):
                    report.failures.append(f"{name}, seed {seed}, input {number} ({len(data)} bytes): {wrong}")
                    if keep is not None:
                        keep.mkdir(parents=True, exist_ok=True)
                        path = keep / f"{name}-{seed}-{number}"
                        atomic_write_bytes(path, data)
                        report.kept.append(str(path))
        return report
    finally:
        worker.end()


_WATCHED = (
    "quota.core.recipe",
    "quota.core.recipe_file",
    "quota.core.recipe_upgrade",
    "quota.core.selection",
    "quota.server.errors",
    "quota.core.images",
    "quota.core.image_files",
    "quota.server.schemas",
    "quota.server.config",
    "quota.server.bodies",
    "quota.calib.samples",
    "quota.core.checkpoint",
    "quota.models.config",
    "quota.calib.work",
    "PIL.Image",
    "PIL.ImageFile",
    "PIL.PngImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.BmpImagePlugin",
    "PIL.TiffImagePlugin",
    "PIL.WebPImagePlugin",
)


def guided(seconds: int, names: Sequence[str], limits: Limits) -> None:
    """libFuzzer on raw bytes, from made inputs on: the first byte chooses the target. Does not return; a crash leaves
    its input in the working folder."""
    import atheris

    for module in _WATCHED:
        for _, owner in [("", import_module(module)), *inspect.getmembers(import_module(module), inspect.isclass)]:
            for _, function in inspect.getmembers(owner, inspect.isfunction):
                if function.__module__ == module:
                    atheris.instrument_func(function)
    targets = [TARGETS[name] for name in names]
    with tempfile.TemporaryDirectory() as corpus:
        for number, (at, target) in itertools.product(range(20), enumerate(targets)):
            Path(corpus, f"{at}-{number}").write_bytes(bytes([at]) + target.make(random.Random(number)))
        options = [
            f"-max_total_time={seconds}",
            "-max_len=65536",
            f"-timeout={limits.seconds:.0f}",
            f"-rss_limit_mb={2048 + (limits.memory_bytes >> 20)}",
        ]
        atheris.Setup(
            [sys.argv[0], *options, corpus],
            lambda data: targets[data[0] % len(targets)].take(data[1:]) if data else None,
        )
        atheris.Fuzz()


def main(arguments: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="repeat for several; all by default")
    parser.add_argument("--limit-seconds", type=float, default=Limits.seconds, help="processor time of one input")
    parser.add_argument("--limit-mib", type=int, default=Limits.memory_bytes // MIB, help="memory of one input")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for inputs that failed")
    parser.add_argument("--guided", action="store_true", help="coverage-guided, with atheris")
    parser.add_argument("--replay", type=Path, help="take one kept input again, here and without limits")
    options = parser.parse_args(arguments)
    names, limits = options.target or list(TARGETS), Limits(options.limit_seconds, options.limit_mib * MIB)
    if options.replay:
        TARGETS[options.replay.name.rsplit("-", 2)[0]].take(options.replay.read_bytes())
        return
    if options.guided:
        guided(int(options.seconds), names, limits)
    report = fuzz(options.seconds, options.seed, names, limits=limits, keep=options.keep)
    print(json.dumps({"inputs": report.inputs, "failures": report.failures, "kept": report.kept}, indent=1))
    sys.exit(bool(report.failures))
