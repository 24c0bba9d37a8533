"""A calibration's steps and what they take, before any runs."""

from __future__ import annotations

from functools import cached_property

from tqdm import tqdm

from quota.calib.export import float_names
from quota.calib.job import Job
from quota.calib.plan import Plan, peak_memory
from quota.calib.speed import Speed, speed_of
from quota.calib.steps import BlockStep, Seconds, steps_of
from quota.calib.work import WorkFolder
from quota.core.errors import CheckpointError
from quota.core.files import free_bytes


class Schedule:
    """steps: in the order they run. paths: of the blocks that are quantized."""

    def __init__(self, job: Job) -> None:
        self.job, self.steps = job, list(steps_of(job))
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
    def seconds(self) -> list[Seconds]:
        """Estimated, of every step."""
        return [step.seconds(self.job, self.speed) for step in self.steps]

    @cached_property
    def speed(self) -> Speed:
        """Of the device."""
        return speed_of(self.job.settings)

    def _disk(self, stored: int, rest: int) -> int:
        """Bytes at the fullest moment: a step's streams beside all blocks, or the last stream and the blocks beside the
        result."""
        settings = self.job.settings
        element = (4 if settings.stream_dtype == "float32" else 2) * (1 if settings.learns_from == "float" else 2)
        rows, widths = (
            [sum(step.lengths(self.job)) for step in self.steps],
            [step.widths(self.job) for step in self.steps],
        )
        beside = [
            n * read + m * write for n, m, (read, write) in zip(rows, [*rows[1:], *rows[-1:]], widths, strict=True)
        ]
        last = rows[-1] * widths[-1][1] if rows else 0
        state = sum(rows[-1:]) * 40 + 1024 * len(self.paths) + 2**12
        return max(element * max(beside, default=0) + stored, element * last + 2 * stored + rest) + 2 * state

    def plan(self) -> Plan:
        """What a run takes. Encodes the samples; writes nothing."""
        job, source, settings = self.job, self.job.source, self.job.settings
        blocks = [step for step in self.steps if isinstance(step, BlockStep)]
        sizes = {step.path: step.size(job) for step in blocks}
        stored = sum(sizes[path].quantized_bytes(settings.makes) for path in self.paths)
        rest = sum(source.stored[name][1] + 256 for name in float_names(source, self.paths))
        rest += sum(path.stat().st_size for path in source.files() if path.suffix != ".safetensors") + 2**16
        longest = max((max(step.lengths(job), default=0) for step in blocks), default=0)
        host, device = peak_memory([sizes[path] for path in self.paths], longest, settings, stored + rest)
        return Plan(
            samples=len(job.samples or ()),
            images=job.images,
            tokens=sum(map(len, job.prompts.ids)),
            blocks=len(self.paths),
            blocks_all=len(blocks),
            peak_memory=host,
            device=settings.device,
            device_memory=device,
            disk_needed=self._disk(stored, rest),
            disk_free=free_bytes(job.folder.parent),
            seconds=sum(map(sum, self.seconds)),
            by=self.speed.by,
        )

    def bar(self, work: WorkFolder, progress: bool) -> tqdm:
        """Counts estimated seconds, so that a step weighs what it takes; the time left is scaled by what the steps so
        far really took."""
        total, done = sum(map(sum, self.seconds)), sum(map(sum, self.seconds[: work.done]))
        shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        return tqdm(total=total, initial=done, disable=not progress, smoothing=0, bar_format=shown)
