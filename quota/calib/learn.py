"""One block: search the start, learn the transforms and clips, keep the best iterate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quota.calib.blocks import Batch, Block
from quota.calib.feed import feed
from quota.calib.settings import Settings
from quota.calib.state import BlockReport
from quota.calib.stream import Stream


@dataclass
class BlockData:
    """What a block learns from: inputs (and the quantized inputs, or None), float outputs, and the seed of the batch
    order."""

    inputs: Stream
    targets: Stream
    quantized: Stream | None
    seed: int


def learn_block(
    block: Block, lesson: BlockData, settings: Settings, progress: Callable[[int], None] | None = None
) -> BlockReport:
    """Calibrate `block` (already `quantize_linears`-ed, on settings.device) and leave it frozen.

    progress: called with the number of finished steps. Deterministic for a given seed, thread count and machine.
    """
    train, held_out = split(len(lesson.inputs), settings.held_out)
    score = Scorer(block, lesson, held_out, settings)
    initialise(block, lesson.inputs, train, settings)
    block.set_mode("rtn")
    mse_rtn = score()
    block.set_mode("learn")
    mse_start = score()
    best = score.objective
    kept, best_step = _snapshot(block), 0
    optimizer, schedule = _optimizer(block, settings)
    scaler = torch.amp.GradScaler(torch.device(settings.device).type, enabled=block.dtype == torch.float16)
    draws = _draws(train, settings, lesson.seed)
    for step, batches in enumerate(feed(_read_by(lesson, settings), draws, settings.device), start=1):
        loss = _loss(block, batches, settings)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss / loss.detach().clamp_min(1e-30)).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if step % settings.evaluate_every == 0 or step == settings.steps:
            score()
            if math.isfinite(score.objective) and score.objective < best:
                best, best_step, kept = score.objective, step, _snapshot(block)
        if progress is not None:
            progress(step)
    _restore(block, kept)
    block.freeze()
    block.set_mode("frozen")
    mse = score()
    signal, update = score.signal()
    return BlockReport(
        name=block.path,
        mse_rtn=mse_rtn,
        mse_start=mse_start,
        mse=mse,
        sqnr_db=decibels(signal, mse),
        update_sqnr_db=decibels(update, mse),
        best_step=best_step,
        steps=settings.steps,
    )


def split(count: int, held_out: int) -> tuple[list[int], list[int]]:
    """Training and held-out items: at most a quarter is held out, evenly spread; one item serves as both."""
    if count == 1:
        return [0], [0]
    wanted = max(1, min(held_out, count // 4))
    chosen = {(2 * i + 1) * count // (2 * wanted) for i in range(wanted)}
    return [i for i in range(count) if i not in chosen], sorted(chosen)


@torch.no_grad()
def initialise(block: Block, inputs: Stream, train: Sequence[int], settings: Settings) -> None:
    """Search the start of every group on evenly spaced tokens of up to eight training items."""
    spread = train[:: max(1, len(train) // 8)][:8]
    block.set_mode("float")
    with block.observing():
        for (batch,) in feed([inputs], [[item] for item in spread], settings.device):
            block(batch)
        if block.heads is not None and block.heads.observed:
            keys, values = (torch.cat(side) for side in zip(*block.heads.observed, strict=True))
            step = max(1, keys.shape[0] // (4 * settings.search_rows))
            block.heads.initialise(keys[::step], values[:: max(1, values.shape[0] // (4 * settings.search_rows))])
        for group in block.projection_groups():
            rows = torch.cat(group.observed or [])
            group.observed = None
            group.initialise(
                rows[:: max(1, rows.shape[0] // settings.search_rows)][: settings.search_rows], settings.diag_alpha
            )


def _draws(train: Sequence[int], settings: Settings, seed: int) -> Iterator[list[int]]:
    """The items of every step: all of them in a shuffled order, again and again."""
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(settings.steps):
        if len(order) < min(settings.batch, len(train)):
            order += [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
        items, order = order[: settings.batch], order[settings.batch :]
        yield items


def _read_by(lesson: BlockData, settings: Settings) -> list[Stream]:
    """The streams a step reads: the targets, what the block sees, and where half of that is float the float inputs."""
    if lesson.quantized is None or settings.learns_from == "float":
        return [lesson.targets, lesson.inputs]
    return [lesson.targets, lesson.quantized, *([lesson.inputs] if settings.learns_from == "mixed" else [])]


def _loss(block: Block, batches: Sequence[Batch], settings: Settings) -> Tensor:
    """batches: of the streams of `_read_by`."""
    target, source, *floats = batches
    for other in floats:
        half = len(source.hidden) // 2
        source.hidden[:half] = other.hidden[:half]
    return _weighted(block(source), target, settings)


def token_weights(target: Batch, settings: Settings) -> Tensor:
    """[B, S], sum 1: how much each token's squared error counts. Where images and text share the stream, text has
    `text_share` of the total."""
    weight = target.valid.float()
    if settings.relative:
        weight = weight / target.hidden.square().mean(-1).clamp_min(1e-12)
    visual = target.valid & target.visual if target.visual is not None else torch.zeros_like(target.valid)
    text = target.valid & ~visual
    if settings.text_share is not None and bool(visual.any()) and bool(text.any()):
        parts = [
            share * weight * mask / (weight * mask).sum()
            for share, mask in ((settings.text_share, text), (1 - settings.text_share, visual))
        ]
        return parts[0] + parts[1]
    return weight / weight.sum()


def _weighted(out: Tensor, target: Batch, settings: Settings) -> Tensor:
    return ((out - target.hidden).square().mean(-1) * token_weights(target, settings)).sum()


class Scorer:
    """Mean squared error of the block in its current mode over the held-out items, with float inputs."""

    def __init__(self, block: Block, lesson: BlockData, items: list[int], settings: Settings) -> None:
        self.block, self.device = block, settings.device
        self.groups = [items[i : i + settings.batch] for i in range(0, len(items), settings.batch)]
        self.lesson, self.settings = lesson, settings
        self.objective = 0.0  # what training minimises, of the latest look

    @torch.no_grad()
    def __call__(self) -> float:
        total, count, self.objective = 0.0, 0, 0.0
        for source, target in feed([self.lesson.inputs, self.lesson.targets], self.groups, self.device):
            out = self.block(source)
            self.objective += float(_weighted(out, target, self.settings))
            error = (out - target.hidden)[target.valid]
            total, count = total + float(error.double().square().sum()), count + error.numel()
        return total / count

    def signal(self) -> tuple[float, float]:
        """Mean squares of the float output and of what the block adds to its input."""
        out = torch.cat([self.lesson.targets.read(i) for items in self.groups for i in items]).double()
        if self.block.kind == "projector":
            return float(out.square().mean()), float(out.square().mean())
        source = torch.cat([self.lesson.inputs.read(i) for items in self.groups for i in items]).double()
        return float(out.square().mean()), float((out - source).square().mean())


def _optimizer(block: Block, settings: Settings) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    groups = [{"params": block.matrices(), "lr": settings.matrix_lr}, {"params": block.clips(), "lr": settings.clip_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, settings.steps))


def _snapshot(block: Block) -> list[Tensor]:
    return [p.detach().clone() for p in block.parameters() if p.requires_grad]


@torch.no_grad()
def _restore(block: Block, values: list[Tensor]) -> None:
    for parameter, value in zip([p for p in block.parameters() if p.requires_grad], values, strict=True):
        parameter.copy_(value)


def decibels(signal: float, noise: float) -> float:
    """Signal over noise, both mean squares."""
    return 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))
