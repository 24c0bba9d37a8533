"""Train an embedded model from scratch: `python -m quota.scenes.train --out DIR [--family qwen2_5_vl]`. Resumable; CPU or GPU.
A model this small gains nothing from a second thread; a second process shares the pictures of every step:
`torchrun --nproc_per_node 2 -m quota.scenes.train --threads 1 ...`.

Stages, in LLaVA's own order (question answering alone does not leave its plateau at this size):
1. dense     every visual token is classified against the word vectors of shapes, colours and places
2. caption   "red heart top left , ..." with the loss on every caption token
3. questions with 30 % captions kept in
4. the same at 336 px (24 x 24 patches), position embeddings interpolated from 12 x 12

Several question-answer segments of one picture share a sequence: each attends to the picture and itself only, and positions
restart after the picture, so training sees exactly what single-question inference does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlavaForConditionalGeneration

from quota.scenes import generate as g
from quota.scenes.model import build_config, build_model, build_processor
from quota.scenes.vocabulary import CAPTION_REQUEST, COLORS, PATCH_SIZE, SHAPES, WORDS

_IDS = {word: i for i, word in enumerate(WORDS)}
PREFIX = ("<s>", "user", ":")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Stage:
    """One leg of the schedule. `questions_per_task` 0 trains captions alone; `language` False the vision side alone; `hard_tasks` asks by HARD_MIX."""

    name: str
    steps: int
    size_px: int
    batch: int
    peak_lr: float
    questions_per_task: int = 0
    caption_share: float = 1.0
    dense_weight: float = 0.0
    language: bool = True
    hard_tasks: bool = False


# Binding a place to an object is learned last: the final stage asks for it more often.
HARD_MIX = {"existence": 6, "attribute": 2, "position": 7, "relation": 5, "counting": 4, "choice": 2}

SCHEDULE = (
    Stage("dense", 1000, 168, 16, 2e-3, dense_weight=1.0, language=False),
    Stage("caption", 1300, 168, 16, 1.5e-3, dense_weight=0.3),
    Stage("questions", 1900, 168, 16, 1.5e-3, questions_per_task=3, caption_share=0.3, dense_weight=0.1),
    Stage("questions-336", 1050, 336, 8, 8e-4, questions_per_task=4, caption_share=0.3, dense_weight=0.3, hard_tasks=True),
)


def encode(text: str) -> list[int]:
    return [_IDS[word] for word in text.split()]


def segments_of(s: g.Scene, stage: Stage, rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of every segment packed behind this picture."""
    out = []
    if not stage.questions_per_task or rng.random() < stage.caption_share:
        out.append((encode(f"{CAPTION_REQUEST} assistant :"), encode(g.caption(s, rng)) + [_IDS["</s>"]]))
    if stage.questions_per_task:
        for q in g.questions(s, HARD_MIX if stage.hard_tasks else stage.questions_per_task, rng):
            out.append((encode(f"{q.text} assistant :"), encode(q.answer) + [_IDS["</s>"]]))
    return out


class Pictures(IterableDataset):
    """Endless batches for one stage, starting at picture `first`: of every step's pictures those of process `rank` of `world`."""

    def __init__(self, stage: Stage, first: int, rank: int = 0, world: int = 1) -> None:
        self.stage, self.first, self.rank, self.world = stage, first, rank, world

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        index = self.first
        while True:
            scenes = [g.scene("train", index + i, self.stage.size_px) for i in range(self.rank, self.stage.batch, self.world)]
            index += self.stage.batch
            yield collate(scenes, self.stage)


def collate(scenes: list[g.Scene], stage: Stage) -> dict[str, Tensor]:
    """Pictures [B, size, size, 3] uint8, dense labels [B, V], and the packed text: ids, labels, segment, positions [B, T]."""
    pixels = torch.from_numpy(np.stack([np.asarray(g.draw(s)) for s in scenes]))
    dense = [g.patch_labels(s, PATCH_SIZE) for s in scenes]
    batch = {
        "pixels": pixels,
        "shape": torch.from_numpy(np.stack([d[0] for d in dense])),
        "color": torch.from_numpy(np.stack([d[1] for d in dense])),
    }
    if not stage.language:
        return batch
    rows: list[list[tuple[int, int, int, int]]] = []  # (id, label, segment, position) per text token
    start = len(PREFIX) + (stage.size_px // PATCH_SIZE) ** 2
    for s in scenes:
        row: list[tuple[int, int, int, int]] = []
        for number, (prompt, answer) in enumerate(segments_of(s, stage, s.seed("training questions")), start=1):
            ids = prompt + answer
            labels = [-100] * len(prompt) + answer
            row.extend((t, label, number, start + i) for i, (t, label) in enumerate(zip(ids, labels, strict=True)))
        rows.append(row)
    length = math.ceil(max(len(r) for r in rows) / 16) * 16
    packed = torch.tensor([r + [(_IDS["<pad>"], -100, -1, 0)] * (length - len(r)) for r in rows])
    for i, name in enumerate(("ids", "labels", "segment", "positions")):
        batch[name] = packed[..., i].contiguous()
    return batch


class DenseHead(nn.Module):
    """Classifies visual tokens against word vectors: shape, colour (or a learned background vector), top or bottom, left or right.

    Finer places have learned vectors of their own (`_BINS` rows and columns), so that "left of" can be read off a token. Not saved.
    """

    _BINS = 12

    def __init__(self, width: int) -> None:
        super().__init__()
        self.background = nn.Parameter(torch.randn(2, width) * width**-0.5)
        self.places = nn.Parameter(torch.randn(2, self._BINS, width) * width**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, tokens: Tensor, words: Tensor, shape: Tensor, color: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, V, D] in raster order -> (loss, share of object tokens with all four words right)."""
        tokens = tokens.float()
        loss, right = tokens.new_zeros(()), torch.ones_like(shape, dtype=torch.bool)
        for i, (names, target) in enumerate(((SHAPES, shape), (tuple(COLORS), color))):
            logits = self._logits(tokens, torch.cat([words[[_IDS[n] for n in names]], self.background[i : i + 1]]))
            wanted = torch.where(target == -1, len(names), target).masked_fill(target == -2, -100)
            balance = torch.ones(len(names) + 1, device=tokens.device)
            balance[-1] = 0.15  # most patches are background
            loss = loss + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight=balance, ignore_index=-100)
            right &= logits.argmax(-1) == target
        side = math.isqrt(tokens.shape[1])
        raster = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        share = torch.where(shape >= 0, 1.0, 0.05)  # the place of an object must be said by its own tokens, and they are few
        share = share / share.sum()
        for i, (ends, line) in enumerate(((("top", "bottom"), raster // side), (("left", "right"), raster % side))):
            coarse, fine = self._logits(tokens, words[[_IDS[n] for n in ends]]), self._logits(tokens, self.places[i])
            for logits, wanted, weight in ((coarse, line * 2 // side, 1.0), (fine, line * self._BINS // side, 0.3)):
                loss = loss + weight * (F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none") * share).sum()
            right &= coarse.argmax(-1) == line * 2 // side
        return loss, right[shape >= 0].float().mean()

    def _logits(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        return tokens @ vectors.float().T * self.log_scale.exp()


def block_mask(segment: Tensor, prefix: int) -> Tensor:
    """Additive mask [B, 1, S, S]: the prefix is causal; a segment sees the prefix and itself, causally."""
    b = segment.shape[0]
    segment = torch.cat([segment.new_zeros(b, prefix), segment], 1)
    order = torch.arange(segment.shape[1], device=segment.device)
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    seen = same & (order[:, None] >= order[None, :])
    return torch.where(seen, 0.0, -1e9)[:, None]


def forward(model: Any, head: DenseHead, batch: dict[str, Tensor], stage: Stage, amp: bool) -> tuple[Tensor, dict[str, float]]:
    """Loss and figures of one packed batch; the loss is weighed by the batch's share of the step's pictures."""
    device, share = model.device, len(batch["pixels"]) / stage.batch
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = batch["pixels"].to(device).permute(0, 3, 1, 2).float().div(255).sub(mean).div(std)
    words = model.get_input_embeddings().weight
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        visual = model.model.multi_modal_projector(hidden)
    dense_loss, dense_right = head(visual, words, batch["shape"].to(device), batch["color"].to(device))
    figures = {"dense": float(dense_right)}
    if not stage.language:
        return dense_loss * share, figures
    ids, labels = batch["ids"].to(device), batch["labels"].to(device)
    b, v = visual.shape[:2]
    lead = words[[_IDS[w] for w in PREFIX]].expand(b, -1, -1)
    embeds = torch.cat([lead, visual.to(words.dtype), words[ids]], 1)
    prefix = len(PREFIX) + v
    positions = torch.cat([torch.arange(prefix, device=device).expand(b, -1), batch["positions"].to(device)], 1)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        mask = block_mask(batch["segment"].to(device), prefix)
        out = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask.to(torch.bfloat16) if amp else mask, position_ids=positions, use_cache=False
        ).last_hidden_state
    target = labels[:, 1:]
    chosen = target != -100
    logits = model.lm_head(out[:, prefix:-1][chosen].float())
    loss = F.cross_entropy(logits, target[chosen])
    figures["text_loss"], figures["token_right"] = float(loss.detach()), float((logits.argmax(-1) == target[chosen]).float().mean())
    return (loss + stage.dense_weight * dense_loss) * share, figures


def enlarge(model: Any, size_px: int, width: int, layers: int) -> Any:
    """The same weights at another picture size: patch position embeddings are interpolated."""
    bigger = build_model(build_config(size_px, width, layers))
    state = model.state_dict()
    key = next(k for k in state if k.endswith("position_embedding.weight"))
    table = state[key]
    old, new = int(math.sqrt(table.shape[0] - 1)), size_px // PATCH_SIZE
    patches = table[1:].T.reshape(1, -1, old, old)
    patches = F.interpolate(patches, size=(new, new), mode="bilinear", align_corners=False)
    state[key] = torch.cat([table[:1], patches.flatten(2)[0].T])
    bigger.load_state_dict(state)
    return bigger.to(model.device)


def save_checkpoint(model: Any, out: Path) -> None:
    """The final artefact: float16 weights with processor, loadable by `from_pretrained`."""
    copy: Any = LlavaForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(out)
    build_processor(model.config.vision_config.image_size).save_pretrained(out)


@dataclass(frozen=True)
class Family:
    """What the loop below must know of an architecture. batches: endless batches from the first picture on."""

    schedule: tuple[Any, ...]
    width: int
    layers: int
    build: Callable[[Any, int, int, int], Any]  # stage, width, layers, seed -> model
    head: Callable[[int], nn.Module]  # width -> the dense head
    batches: Callable[[Any, int, int, int], IterableDataset]  # stage, first picture, rank, world
    forward: Callable[..., tuple[Tensor, dict[str, float]]]  # model, head, batch, stage, amp -> this process's share of the loss, figures
    resize: Callable[[Any, Any, int, int], Any]  # model, stage, width, layers -> the model for that stage
    save: Callable[[Any, Path], None]


def _llava() -> Family:
    def resize(model: Any, stage: Stage, width: int, layers: int) -> Any:
        return model if model.config.vision_config.image_size == stage.size_px else enlarge(model, stage.size_px, width, layers)

    return Family(
        SCHEDULE, 192, 8, lambda stage, width, layers, seed: build_model(build_config(stage.size_px, width, layers), seed), DenseHead, Pictures, forward,
        resize, save_checkpoint,
    )  # fmt: skip


def find_family(name: str) -> Family:
    """The family called `name`; ValueError names the known ones."""
    if name == "llava":
        return _llava()
    if name == "qwen2_5_vl":
        from quota.scenes.train_qwen2_5_vl import FAMILY

        return FAMILY
    raise ValueError(f"family: expected 'llava' or 'qwen2_5_vl', got {name!r}")


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Over all processes; a parameter without a gradient counts as zero."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


def merge_figures(figures: dict[str, float], world: int) -> dict[str, float]:
    """The figures of all processes; what several report is their mean."""
    seen: list[dict[str, float]] = [{} for _ in range(world)]
    dist.all_gather_object(seen, figures)
    return {k: float(np.mean([s[k] for s in seen if k in s])) for s in seen for k in s}


def train(out: Path, *, width: int, layers: int, seed: int, device: str, amp: bool, schedule: tuple[Any, ...], family: str = "llava") -> None:
    """Run the schedule, continuing from `out/training.pt` when it is there. Under torchrun the processes share every step; the first one writes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    out.mkdir(parents=True, exist_ok=True)
    made = find_family(family)
    state_file = out / "training.pt"
    saved: dict[str, Any] = torch.load(state_file, weights_only=True) if state_file.exists() else {"stage": 0, "step": 0, "pictures": 0}
    model = made.build(schedule[saved["stage"]], width, layers, seed).to(device)
    head = made.head(width).to(device)
    if "model" in saved:
        model.load_state_dict(saved["model"])
        head.load_state_dict(saved["head"])
    if "model" in saved and rank == 0:
        print(f"continuing stage {schedule[saved['stage']].name} at step {saved['step']}", flush=True)
    pictures = saved["pictures"]
    for number in range(saved["stage"], len(schedule)):
        stage = schedule[number]
        model = made.resize(model, stage, width, layers)
        parameters = [*model.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=stage.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
        resumed = number == saved["stage"] and "optimizer" in saved
        if resumed:
            optimizer.load_state_dict(saved["optimizer"])
        first_step = saved["step"] if resumed else 0
        model.train()
        batches = iter(DataLoader(made.batches(stage, pictures, rank, world), batch_size=None, num_workers=1, prefetch_factor=8))
        began, last_save, window = time.time(), time.time(), []
        for step in range(first_step, stage.steps):
            warm = min(1.0, (step + 1) / 200)
            last = number == len(schedule) - 1
            decay = 0.5 * (1 + math.cos(math.pi * step / stage.steps)) if last else 1.0
            for group in optimizer.param_groups:
                group["lr"] = stage.peak_lr * warm * max(decay, 0.02)
            loss, figures = made.forward(model, head, next(batches), stage, amp)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if world > 1:
                sum_gradients(parameters)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            pictures += stage.batch
            window.append({"loss": float(loss.detach()) * world, **figures})
            if (step + 1) % 50 == 0 and world > 1:
                window = [merge_figures(w, world) for w in window]
            if (step + 1) % 50 == 0 and rank == 0:
                seen = {k for w in window for k in w}
                mean = {k: round(float(np.mean([w[k] for w in window if k in w])), 4) for k in sorted(seen)}
                rate = (step + 1 - first_step) * stage.batch / (time.time() - began)
                print(json.dumps({"stage": stage.name, "step": step + 1, "of": stage.steps, "pictures_per_s": round(rate, 1), **mean}), flush=True)
            if (step + 1) % 50 == 0:
                window = []
            if rank == 0 and (time.time() - last_save > 120 or step + 1 == stage.steps):
                modules = {"model": model, "head": head, "optimizer": optimizer}
                record = {"stage": number, "step": step + 1, "pictures": pictures, **{k: m.state_dict() for k, m in modules.items()}}
                torch.save(record, state_file.with_suffix(".tmp"))
                state_file.with_suffix(".tmp").replace(state_file)
                last_save = time.time()
        saved = {"stage": number + 1}
        if rank == 0:
            made.save(model, out / "checkpoint")
    if rank == 0:
        (out / "schedule.json").write_text(json.dumps([asdict(s) for s in schedule], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for training.pt (to resume) and checkpoint/ (the result)")
    parser.add_argument("--family", choices=("llava", "qwen2_5_vl"), default="llava")
    parser.add_argument("--width", type=int, default=0, help="width of the language model (default: 192)")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--no-amp", action="store_true", help="float32 throughout instead of bfloat16 autocast")
    parser.add_argument("--steps", default="", help="other step counts for the stages, comma separated")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if "WORLD_SIZE" in os.environ:  # torchrun says so
        dist.init_process_group("gloo")
    made = find_family(args.family)
    schedule = made.schedule
    if args.steps:
        counts = [int(c) for c in args.steps.split(",")]
        schedule = tuple(replace(s, steps=c) for s, c in zip(schedule, counts, strict=True))
    sizes = {"width": args.width or made.width, "layers": args.layers or made.layers}
    train(args.out, **sizes, seed=args.seed, device=args.device, amp=not args.no_amp, schedule=schedule, family=args.family)


if __name__ == "__main__":
    main()
