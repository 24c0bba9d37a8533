"""Train an embedded model from scratch: `python -m tools.scenes.train --out DIR [--family qwen2_5_vl]`. Resumable; CPU
or GPU. A model this small gains nothing from a second thread; a second process shares the images of every step:
`torchrun --nproc_per_node 2 -m tools.scenes.train --threads 1 ...`.

Stages, in LLaVA's own order (question answering alone does not leave its plateau at this size):
1. dense     every visual token is classified against the word vectors of shapes, colours and places
2. caption   "red heart top left , ..." with the loss on every caption token
3. questions with 30 % captions kept in
4. the same at 336 px (24 x 24 patches), position embeddings interpolated from 12 x 12

Several question-answer segments of one image share a sequence: each attends to the image and itself only, and
positions restart after the image, so training sees exactly what single-question inference does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from quota.core.errors import QuotaError
from quota.core.files import claim_folder
from tools.scenes import llava, qwen2_5_vl
from tools.scenes.training import Family

FAMILIES = {"llava": llava.FAMILY, "qwen2_5_vl": qwen2_5_vl.FAMILY}


def find_family(name: str) -> Family:
    """The family called `name`; ValueError names the known ones."""
    if name not in FAMILIES:
        raise ValueError(f"family: expected {' or '.join(map(repr, FAMILIES))}, got {name!r}")
    return FAMILIES[name]


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


def train(
    out: Path,
    *,
    width: int,
    layers: int,
    seed: int,
    device: str,
    amp: bool,
    schedule: tuple[Any, ...],
    family: str = "llava",
) -> None:
    """Run the schedule, continuing from `out/training.pt` when it is there. Under torchrun the processes share every
    step; the first one writes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if rank == 0:
        claim_folder(out)
    if world > 1:
        dist.barrier()
    made = find_family(family)
    state_file = out / "training.pt"
    saved: dict[str, Any] = (
        torch.load(state_file, weights_only=True) if state_file.exists() else {"stage": 0, "step": 0, "images": 0}
    )
    model = made.build(schedule[saved["stage"]], width, layers, seed).to(device)
    head = made.head(width).to(device)
    if "model" in saved:
        model.load_state_dict(saved["model"])
        head.load_state_dict(saved["head"])
    if "model" in saved and rank == 0:
        print(f"continuing stage {schedule[saved['stage']].name} at step {saved['step']}", flush=True)
    images = saved["images"]
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
        batches = iter(
            DataLoader(made.batches(stage, images, rank, world), batch_size=None, num_workers=1, prefetch_factor=8)
        )
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
            images += stage.batch
            window.append({"loss": float(loss.detach()) * world, **figures})
            if (step + 1) % 50 == 0 and world > 1:
                window = [merge_figures(w, world) for w in window]
            if (step + 1) % 50 == 0 and rank == 0:
                seen = {k for w in window for k in w}
                mean = {k: round(float(np.mean([w[k] for w in window if k in w])), 4) for k in sorted(seen)}
                rate = (step + 1 - first_step) * stage.batch / (time.time() - began)
                print(
                    json.dumps(
                        {
                            "stage": stage.name,
                            "step": step + 1,
                            "of": stage.steps,
                            "pictures_per_s": round(rate, 1),
                            **mean,
                        }
                    ),
                    flush=True,
                )
            if (step + 1) % 50 == 0:
                window = []
            if rank == 0 and (time.time() - last_save > 120 or step + 1 == stage.steps):
                modules = {"model": model, "head": head, "optimizer": optimizer}
                record = {
                    "stage": number,
                    "step": step + 1,
                    "images": images,
                    **{k: m.state_dict() for k, m in modules.items()},
                }
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
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="new folder for training.pt and checkpoint/ (the result), or the one to continue in",
    )
    parser.add_argument("--family", choices=tuple(FAMILIES), default="llava")
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
    try:
        train(
            args.out,
            **sizes,
            seed=args.seed,
            device=args.device,
            amp=not args.no_amp,
            schedule=schedule,
            family=args.family,
        )
    except QuotaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
