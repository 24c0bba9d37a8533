"""A calibration's steps and what they take, before any runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from tqdm import tqdm

from quota.calib.crew import ahead
from quota.calib.export import float_names
from quota.calib.job import Job
from quota.calib.plan import BlockSize, Plan, learning_memory, peak_memory
from quota.calib.speed import Speed, speed_of
from quota.calib.steps import BlockStep, Seconds, steps_of
from quota.calib.work import WorkFolder
from quota.core.errors import CheckpointError
from quota.core.files import free_bytes
from quota.core.threads import one_thread

_SMALL_PARAMETERS = 1 << 24  # of a block: below, one thread calibrates it
_CREW_BYTES = 2 << 30  # that blocks calibrated side by side hold together


class Schedule:
    """steps: in the order they run. paths: of the blocks that are quantized."""

    def __init__(self, job: Job) -> None:
        self.job, self.steps, self._threads = job, list(steps_of(job)), torch.get_num_threads()
        self.paths = self._quantized(len(self.steps))

    def _quantized(self, done: int) -> list[str]:
        return [step.path for step in self.steps[:done] if step.is_quantized(self.job.settings)]

    def check(self, work: WorkFolder) -> None:
        """CheckpointError where a state file that is well formed cannot be one of these steps'."""
        lost = [path for path in self._quantized(work.done) if path not in work.blocks]
        if work.done > len(self.steps) or lost or (work.done and self.job.samples and "float" not in work.streams):
            raise CheckpointError(
                f"{work.path}: expected the state of one of {len(self.steps)} steps, got done {work.done} with"
                f" {len(work.blocks)} blocks and streams {sorted(work.streams)}; start again with"
                " --fresh"
            )

    @cached_property
    def sizes(self) -> dict[str, BlockSize]:
        """Sizes of every block, by path."""
        return {step.path: step.size(self.job) for step in self.steps if isinstance(step, BlockStep)}

    @property
    def apart(self) -> bool:
        """Whether every block is calibrated on one thread, however many there are: on the CPU, where all are small and
        none waits for another's result."""
        job = self.job
        if job.samples is None or not job.settings.on_cpu or job.settings.learns_from != "float":
            return False
        return all(size.parameters <= _SMALL_PARAMETERS for size in self.sizes.values())

    @cached_property
    def crew(self) -> int:
        """How many blocks are calibrated at once."""
        if not self.apart:
            return 1
        most = learning_memory([self.sizes[path] for path in self.paths], self._longest, self.job.settings)
        return max(1, min(self._threads, len(self.paths), _CREW_BYTES // most))

    @contextmanager
    def threads(self) -> Iterator[None]:
        """What runs while this is open has the threads it is to have."""
        if not self.apart:
            yield
            return
        with one_thread():
            yield

    @property
    def _longest(self) -> int:
        blocks = [step for step in self.steps if isinstance(step, BlockStep)]
        return max((max(step.lengths(self.job), default=0) for step in blocks), default=0)

    @cached_property
    def seconds(self) -> list[Seconds]:
        """Estimated, of every step."""
        return [step.seconds(self.job, self.speed) for step in self.steps]

    @cached_property
    def speed(self) -> Speed:
        """Speed of the device."""
        with self.threads():
            return speed_of(self.job.settings)

    def _first_uncommitted(self, number: int) -> int:
        """The earliest step that need not be committed while step `number` runs."""
        calibrated = [n for n, step in enumerate(self.steps[:number]) if step.is_quantized(self.job.settings)]
        waiting = ahead(self.crew)
        return calibrated[-waiting:][0] if waiting and calibrated else number

    def _disk(self, stored: int, rest: int) -> int:
        """Bytes at the fullest moment: the streams of steps that are not committed beside all blocks, or the last
        stream and the blocks beside the result."""
        settings = self.job.settings
        element = (4 if settings.stream_dtype == "float32" else 2) * (1 if settings.learns_from == "float" else 2)
        rows = [sum(step.lengths(self.job)) for step in self.steps]
        widths = [step.widths(self.job) for step in self.steps]
        left = [n * write for n, (_, write) in zip([*rows[1:], *rows[-1:]], widths, strict=True)]
        first = [self._first_uncommitted(number) for number in range(len(rows))]
        beside = [rows[f] * widths[f][0] + sum(left[f : number + 1]) for number, f in enumerate(first)]
        last = rows[-1] * widths[-1][1] if rows else 0
        state = sum(rows[-1:]) * 40 + 1024 * len(self.paths) + 2**12
        return max(element * max(beside, default=0) + stored, element * last + 2 * stored + rest) + 2 * state

    def plan(self) -> Plan:
        """What a run takes. Encodes the samples; writes nothing."""
        job, source, settings = self.job, self.job.source, self.job.settings
        sizes = [self.sizes[path] for path in self.paths]
        stored = sum(size.quantized_bytes(settings.makes) for size in sizes)
        rest = sum(source.stored[name][1] + 256 for name in float_names(source, self.paths))
        rest += sum(path.stat().st_size for path in source.files() if path.suffix != ".safetensors") + 2**16
        host, device = peak_memory(sizes, self._longest, settings, stored + rest, self.crew)
        return Plan(
            samples=len(job.samples or ()),
            images=job.images,
            tokens=sum(map(len, job.prompts.ids)),
            blocks=len(self.paths),
            blocks_all=len(self.sizes),
            peak_memory=host,
            device=settings.device,
            device_memory=device,
            disk_needed=self._disk(stored, rest),
            disk_free=free_bytes(job.folder.parent),
            seconds=sum(map(sum, self.seconds)) / self.crew,
            by=self.speed.by,
        )

    def bar(self, work: WorkFolder, progress: bool) -> tqdm:
        """Counts estimated seconds, so that a step weighs what it takes; the time left is scaled by what the steps so
        far really took."""
        total, done = sum(map(sum, self.seconds)), sum(map(sum, self.seconds[: work.done]))
        shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        return tqdm(total=total, initial=done, disable=not progress, smoothing=0, bar_format=shown)
