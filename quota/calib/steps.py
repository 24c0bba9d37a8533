"""The steps of a calibration, a class each: what it does, the rows it reads, what it weighs and what it is called.

Each reads the streams that the step before left and leaves its own: "float", and "quantized" where blocks learn from
quantized inputs. Nothing else passes from one to the next, so a calibration continues after any of them.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from quota.calib import prune
from quota.calib.blocks import Block
from quota.calib.feed import advance
from quota.calib.job import Job
from quota.calib.learn import BlockData, learn_block
from quota.calib.plan import BlockSize, block_seconds
from quota.calib.rows import Rows, map_rows, select_features
from quota.calib.samples import encode
from quota.calib.settings import METHODS, Settings
from quota.calib.speed import Speed
from quota.calib.state import BlockReport, StreamName
from quota.calib.stream import Stream, embed_images, embed_text
from quota.calib.weight_only import quantize_weights, round_weights
from quota.calib.work import WorkFolder
from quota.models.groups import PARTS, Part
from quota.models.images import ImageIndex, ImageInput, ImageTokens

Streams = dict[StreamName, Stream]
Seconds = tuple[float, float]  # passing the samples through the step, calibrating its block
Learned = tuple[dict[str, Tensor], BlockReport]  # the checkpoint's tensors of a block, and what calibration did to it
Learn = Callable[[Callable[[float], None]], Learned]


@dataclass(frozen=True)
class Left:
    """What a step leaves. streams: what the next one reads. learn: what is still to be done to its block, on any
    thread; only the checkpoint waits for it. It is called with a function that takes each finished share, in sum 1."""

    streams: Streams
    learn: Learn | None = None


class Ticks:
    """One step's share of the bar. passing, calibrating: its estimated seconds."""

    def __init__(self, bar: tqdm, passing: float, calibrating: float) -> None:
        self.bar, self.passing, self.calibrating = bar, passing, calibrating

    def passed(self) -> None:
        """The samples went through the step."""
        self._move(self.passing)

    def calibrated(self, share: float) -> None:
        """That share of the calibration is done."""
        self._move(self.calibrating * share)

    def _move(self, seconds: float) -> None:
        with self.bar.get_lock():  # blocks that learn side by side move it
            self.bar.update(min(seconds, self.bar.total - self.bar.n))  # sums of shares round


@dataclass(frozen=True)
class Step(ABC):
    """path: of the module it concerns. index: of the layer."""

    path: str
    index: int = 0

    @property
    def words(self) -> str:
        """What the progress bar calls it."""
        return self.path.removeprefix("model.")

    def is_quantized(self, settings: Settings) -> bool:
        """Whether it calibrates a block."""
        return False

    @abstractmethod
    def lengths(self, job: Job) -> list[int]:
        """Rows of each item in the stream it reads."""

    @abstractmethod
    def widths(self, job: Job) -> tuple[int, int]:
        """Widths of the streams that the step reads and writes, what goes along with a row included."""

    def seconds(self, job: Job, speed: Speed) -> Seconds:
        """Estimated at this machine's speed; here of a step that only reads and writes rows."""
        elements = sum(self.lengths(job)) * job.source.family.hidden_size
        return elements * (16 * speed.element_s + 8 * speed.byte_s), 0.0

    @abstractmethod
    def run(self, job: Job, work: WorkFolder, ticks: Ticks) -> Left:
        """Do it, but for what may be done later."""


class _OfTower(Step):
    """Reads the tower's stream, an item per image."""

    def lengths(self, job: Job) -> list[int]:
        return [job.source.family.tower_rows(grid) for grid in job.prompts.all_grids]

    def widths(self, job: Job) -> tuple[int, int]:
        family = job.source.family
        width = family.vision_hidden_size * (1 + sum(tap < self.index for tap in family.taps))
        return width, width


class _OfDecoder(Step):
    """Reads the decoder's stream, an item per sample."""

    def lengths(self, job: Job) -> list[int]:
        return job.rows_after(candidate for candidate in job.candidates if candidate < self.index)

    def widths(self, job: Job) -> tuple[int, int]:
        family = job.source.family
        width = family.hidden_size * (1 + max(len(family.taps) - self.index, 0))
        return width, width


class EmbedImages(_OfTower):
    """Pixels -> what the tower's first block reads."""

    def widths(self, job: Job) -> tuple[int, int]:
        return 0, job.source.family.vision_hidden_size

    def run(self, job: Job, work: WorkFolder, ticks: Ticks) -> Left:
        ticks.passed()
        path, dtype = work.stream_path("float"), job.settings.stream_dtype
        return Left({"float": embed_images(job.source, self._images(job), job.prompts.all_grids, path, dtype)})

    @staticmethod
    def _images(job: Job) -> Iterator[ImageInput]:
        for sample in job.samples or ():
            if sample.image_bytes is not None:
                yield from job.source.family.images(encode(job.processor, sample, answer=True))


class Tap(_OfTower):
    """The output of tower block `index` goes along from here on, beside what goes on."""

    def widths(self, job: Job) -> tuple[int, int]:
        width = super().widths(job)[0]
        return width, width + job.source.family.vision_hidden_size

    def run(self, job: Job, work: WorkFolder, ticks: Ticks) -> Left:
        ticks.passed()
        return _mapped(work, lambda item, rows: (rows[0], torch.cat([rows[1], rows[0]], -1)))


class SelectFeatures(_OfTower):
    """What the tower left -> what the projectors read."""

    def widths(self, job: Job) -> tuple[int, int]:
        family = job.source.family
        read = family.vision_hidden_size * (1 + len(family.taps))
        return read, read * family.merge**2

    def run(self, job: Job, work: WorkFolder, ticks: Ticks) -> Left:
        ticks.passed()
        return Left(
            {name: select_features(job.source, stream, work.stream_path(name)) for name, stream in work.streams.items()}
        )


class EmbedText(_OfDecoder):
    """Projected images -> prompts, before any drop."""

    def lengths(self, job: Job) -> list[int]:
        return job.rows_after(())

    def run(self, job: Job, work: WorkFolder, ticks: Ticks) -> Left:
        ticks.passed()
        ids = [torch.tensor(ids) for ids in job.prompts.ids]
        return Left(
            {
                name: embed_text(job.source, ids, stream, work.stream_path(name), job.prompts.grids)
                for name, stream in work.streams.items()
            }
        )


class ChooseTokens(_OfDecoder):
    """Marks the visual tokens that the recipe drops at candidate `index`: the choice may read the layer before it, so
    it precedes that layer."""

    def seconds(self, job: Job, speed: Speed) -> Seconds:
        size = BlockSize.of(job.source.skeleton.get_submodule(self.path), job.source.family, "decoder")
        return 2 * block_seconds(size, self.lengths(job), None, job.settings, speed)[0], 0.0

    def run(self, job: Job, work: WorkFolder, ticks: Ticks) -> Left:
        ticks.passed()
        assert job.recipe is not None
        before = self._block(job, self.index - 1) if self.index else None
        pair = (before, self._block(job, self.index))
        masks = prune.keep_masks(
            job.recipe, self.index, pair, work.streams["float"], partial(self._shown, job), job.settings.device
        )
        for stream in work.streams.values():
            for item, kept in enumerate(masks):
                stream.drops[stream.rows(item)] = ~kept
        return Left(work.streams)

    @staticmethod
    def _block(job: Job, index: int) -> Block:
        path = job.source.family.decoder_layer(index)
        return job.source.block("decoder", path, job.settings.device, job.settings.products)

    @staticmethod
    def _shown(job: Job, item: int) -> tuple[ImageIndex, ImageTokens]:
        ids = torch.tensor([job.prompts.ids[item]], device=job.settings.device)
        index = job.source.family.image_index(ids, job.prompts.grids[item])
        return index, ImageTokens.of(index.tile, job.prompts.images[item])


class DropTokens(_OfDecoder):
    """Leaves the marked tokens behind."""

    def run(self, job: Job, work: WorkFolder, ticks: Ticks) -> Left:
        ticks.passed()
        assert job.recipe is not None
        how = job.recipe.position_policy == "compact", job.source.family.first_position
        return Left({name: prune.gather(stream, work.stream_path(name), *how) for name, stream in work.streams.items()})


class BlockStep(Step):
    """One block of `part`: the samples go through the float block, and it is calibrated where its module is chosen."""

    part: Part

    def is_quantized(self, settings: Settings) -> bool:
        return self.part in [PARTS[name] for name in settings.modules]

    def width(self, job: Job) -> int:
        """Width of what the block gives."""
        family = job.source.family
        return family.vision_hidden_size if self.part == "vision" else family.hidden_size

    def size(self, job: Job) -> BlockSize:
        """Sizes of the block."""
        return BlockSize.of(job.source.skeleton.get_submodule(self.path), job.source.family, self.part)

    def seconds(self, job: Job, speed: Speed) -> Seconds:
        method = METHODS[job.settings.method] if self.is_quantized(job.settings) else None
        return block_seconds(self.size(job), self.lengths(job), method, job.settings, speed)

    def run(self, job: Job, work: WorkFolder, ticks: Ticks) -> Left:
        settings = job.settings
        block = job.source.block(self.part, self.path, settings.device, settings.products)
        if job.samples is None:
            work.save_block(self.path, round_weights(block, settings.makes), None)
            ticks.calibrated(1)
            return Left({})
        inputs, quantized = work.streams["float"], work.streams.get("quantized")
        outputs = self._advanced(block, "float", inputs, job, work)
        ticks.passed()
        quantizes = self.is_quantized(settings)
        if quantizes and self.path in work.blocks:
            ticks.calibrated(1)  # kept when other files of the work folder were damaged: learns_from is "float"
            return Left({"float": outputs})
        if quantizes and quantized is None and settings.learns_from != "float":
            quantized = inputs
        seed = zlib.crc32(f"{settings.seed}:{self.path}".encode())
        learn = partial(_learned, block, BlockData(inputs, outputs, quantized, seed), settings) if quantizes else None
        if quantized is None:
            return Left({"float": outputs}, learn)
        if learn is not None:  # the next step reads what the quantized block makes
            work.save_block(self.path, *learn(ticks.calibrated))
        return Left({"float": outputs, "quantized": self._advanced(block, "quantized", quantized, job, work)})

    def _advanced(self, block: Block, name: StreamName, source: Stream, job: Job, work: WorkFolder) -> Stream:
        target = source.like(work.stream_path(name), self.width(job))
        advance(block, source, target, job.settings.batch, job.settings.device)
        return target


def _learned(block: Block, lesson: BlockData, settings: Settings, told: Callable[[float], None]) -> Learned:
    """Calibrate the block. told: as of `Left.learn`."""
    learns = METHODS[settings.method].learns
    share = 1 / (1 + (settings.steps if learns else len(block.plans)))
    if learns:
        block.quantize_linears(settings.makes)
        report = learn_block(block, lesson, settings, progress=lambda _: told(share))
        tensors = block.export()
    else:
        tensors, report = quantize_weights(block, lesson, settings, progress=lambda _: told(share))
    told(share)
    return tensors, report


class TowerBlock(BlockStep, _OfTower):
    part = "vision"


class _OfProjectors(Step):
    """Reads what is to be projected: a row per visual token. index: how many projectors have run."""

    def lengths(self, job: Job) -> list[int]:
        family = job.source.family
        return [family.tower_rows(grid) // family.merge**2 for grid in job.prompts.all_grids]

    def widths(self, job: Job) -> tuple[int, int]:
        family = job.source.family
        read, written = family.vision_hidden_size * family.merge**2, family.hidden_size
        done, todo = written * self.index, read * (len(family.taps) - self.index)
        return done + read + todo, done + written + todo


class Projector(BlockStep, _OfProjectors):
    part = "projector"


class NextFeatures(_OfProjectors):
    """What projector `index` gave goes behind what goes along; the next features come to the front, in the end those
    that the first projector gave."""

    def widths(self, job: Job) -> tuple[int, int]:
        return super().widths(job)[1:] * 2

    def run(self, job: Job, work: WorkFolder, ticks: Ticks) -> Left:
        ticks.passed()
        family = job.source.family
        last = self.index == len(family.taps)
        width = family.hidden_size if last else family.vision_hidden_size * family.merge**2
        return _mapped(work, lambda item, rows: (rows[1][:, :width], torch.cat([rows[1][:, width:], rows[0]], -1)))


class DecoderBlock(BlockStep, _OfDecoder):
    part = "decoder"

    def lengths(self, job: Job) -> list[int]:
        return job.rows_after(candidate for candidate in job.candidates if candidate <= self.index)


class AddPlane(_OfDecoder):
    """The first plane that goes along is added to what layer `index` gave."""

    def lengths(self, job: Job) -> list[int]:
        return job.rows_after(candidate for candidate in job.candidates if candidate <= self.index)

    def run(self, job: Job, work: WorkFolder, ticks: Ticks) -> Left:
        ticks.passed()
        width = job.source.family.hidden_size
        return _mapped(work, lambda item, rows: (rows[0] + rows[1][:, :width], rows[1][:, width:]))


def _mapped(work: WorkFolder, change: Callable[[int, Rows], Rows]) -> Left:
    return Left({name: map_rows(stream, work.stream_path(name), change) for name, stream in work.streams.items()})


def steps_of(job: Job) -> Iterator[Step]:
    """The steps in the order they run; without samples the blocks alone, which need no streams."""
    every = _every_step(job)
    return every if job.samples is not None else (step for step in every if step.is_quantized(job.settings))


def _every_step(job: Job) -> Iterator[Step]:
    family = job.source.family
    yield EmbedImages(family.vision_path)
    for index in range(family.vision_layers_used):
        yield TowerBlock(family.vision_layer(index), index)
        if index in family.taps:
            yield Tap(family.vision_layer(index), index)
    yield SelectFeatures(family.vision_path)
    for index, path in enumerate(family.projector_paths):
        yield Projector(path, index)
        if family.taps:
            yield NextFeatures(path, index)
    if "llm" not in job.settings.modules:
        return
    yield EmbedText(family.embed_path)
    if 0 in job.candidates:
        yield ChooseTokens(family.decoder_layer(0), 0)
    for index in range(family.layers):
        if index in job.candidates:
            yield DropTokens(family.decoder_layer(index), index)
        if index + 1 in job.candidates:
            yield ChooseTokens(family.decoder_layer(index), index + 1)
        yield DecoderBlock(family.decoder_layer(index), index)
        if index < len(family.taps):
            yield AddPlane(family.decoder_layer(index), index)
