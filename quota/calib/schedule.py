"""A calibration's steps and what they take, before any runs."""

from __future__ import annotations

from functools import cached_property

from tqdm import tqdm

from quota.calib.export import float_names
from quota.calib.job import Job
from quota.calib.plan import Plan, measured_rate, peak_memory
from quota.calib.steps import BlockStep, Projector, Seconds, steps_of
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
        rate = measured_rate(self.job.settings.device)
        return [step.seconds(self.job, rate) for step in self.steps]

    def plan(self) -> Plan:
        """What a run takes. Encodes the samples; writes nothing."""
        job, source, settings = self.job, self.job.source, self.job.settings
        blocks = [step for step in self.steps if isinstance(step, BlockStep)]
        sizes = {step.path: step.size(job) for step in blocks}
        stored = sum(sizes[path].quantized_bytes(settings.method) for path in self.paths)
        rest = sum(source.stored[name][1] + 256 for name in float_names(source, self.paths))
        rest += sum(path.stat().st_size for path in source.files() if path.suffix != ".safetensors") + 2**17
        rows = [(step.lengths(job), step.width(job)) for step in self.steps]
        rows += [
            (step.lengths(job), 4 * source.family.vision_hidden_size)
            for step in self.steps
            if isinstance(step, Projector)
        ]
        element = 4 if settings.stream_dtype == "float32" else 2
        streams = (
            max((sum(lengths) * width for lengths, width in rows), default=0)
            * element
            * (2 if settings.learns_from == "float" else 4)
        )
        tokens = sum(map(len, job.prompts.ids))
        return Plan(
            samples=len(job.samples or ()),
            images=job.images,
            tokens=tokens,
            blocks=len(self.paths),
            blocks_all=len(blocks),
            peak_memory=peak_memory(
                list(sizes.values()), max((max(n, default=0) for n, _ in rows), default=0), settings, stored + rest
            ),
            disk_needed=streams + 2 * stored + rest + 96 * tokens + 2**16,
            disk_free=free_bytes(job.folder.parent),
            seconds=sum(map(sum, self.seconds)),
        )

    def bar(self, work: WorkFolder, progress: bool) -> tqdm:
        """Counts estimated seconds, so that a step weighs what it takes; the time left is scaled by what the steps so
        far really took."""
        total, done = sum(map(sum, self.seconds)), sum(map(sum, self.seconds[: work.done]))
        shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        return tqdm(total=total, initial=done, disable=not progress, smoothing=0, bar_format=shown)
