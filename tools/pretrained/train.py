"""Train the pretrained model's projector and LoRA: `python -m tools.pretrained.train RUN --parts PARTS`.

RUN is a folder: `state.pt` (all that a run needs to go on, replaced as a whole every few minutes), `log.jsonl` (a line
per report). Stop the process whenever you like, with any signal; the same command goes on from the last state, here or
on another machine to which RUN was copied.

Three stages:
  dense      the projector alone, on stored tower features: every visual token becomes the sum of the word vectors of
             what it shows (colour, shape, texture, size, place, written word), so that the language model reads images
             as text from its first step
  describe   projector and LoRA on descriptions and a few questions of fresh images, packed behind their image: most to
             learn per token
  ask        the same on many questions, with descriptions for three images in ten

A line says: stage, step of steps, loss of answers and of descriptions (nats per token, running mean), seconds per step,
hours left at that pace; every --eval-every steps the share of held-out questions whose whole greedy answer is right, by
task (test split; never trained on). What is evaluated and exported is the running mean of the weights, which is better
than the last ones while the learning rate is high.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.pretrained import deltas
from tools.pretrained.dense import Dictionary, labels_of
from tools.pretrained.lessons import LABELS, MIX, Lesson, Prompts, lesson, pixels
from tools.pretrained.model import Student
from tools.pretrained.parts import VISUAL_TOKENS

_MEAN_OVER_STEPS = 40
_SAVE_SECONDS = 240


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. dense_lessons: whose features are stored. batch: lessons per step. first_lesson: number of the
    first training lesson of the language steps, past those that a run before this one saw. lr falls over the last
    `fall` of all language steps."""

    dense_lessons: int = 480
    dense_steps: int = 1200
    dense_batch: int = 8
    dense_lr: float = 2e-3
    first_lesson: int = 0
    describe_steps: int = 40
    describe_batch: int = 2
    steps: int = 250
    batch: int = 2
    lr: float = 7e-4
    warm: int = 30
    fall: float = 0.5
    dense_weight: float = 0.1
    described_weight: float = 0.7

    @property
    def all_steps(self) -> int:
        """Steps of the describe and the ask stage."""
        return self.describe_steps + self.steps

    def lessons(self, step: int) -> tuple[range, bool]:
        """(numbers of the training lessons of a language step, whether they are brief)."""
        if step < self.describe_steps:
            first = self.first_lesson + step * self.describe_batch
            return range(first, first + self.describe_batch), True
        asked = (step - self.describe_steps) * self.batch
        first = self.first_lesson + self.describe_steps * self.describe_batch + asked
        return range(first, first + self.batch), False


class Run:
    """One training run in its folder."""

    def __init__(self, folder: Path, parts: Path, plan: Plan, start: Path | None) -> None:
        from transformers import AutoTokenizer

        self.folder, self.plan = folder, plan
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(parts)
        self.student, self.prompts = Student(parts), Prompts(tokenizer)
        self.dictionary = Dictionary(self.student.words, tokenizer)
        self.parameters = self.student.trained()
        self.dense = self.step = 0
        self.optimizer: Any = None
        if self.state_file.exists():
            self._resume()
        else:
            if start is not None:
                known = deltas.load_start(start, self.parameters, self.student.projector)
                self.dense = plan.dense_steps if known else 0
            self.mean = {name: p.detach().clone() for name, p in self.parameters.items()}

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    # -- state ---------------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        saved = torch.load(self.state_file, weights_only=True)
        self.dense, self.step, self.mean = saved["dense"], saved["step"], saved["mean"]
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(saved["weights"][name])
        projector = self.student.projector
        projector.mean.copy_(saved["feature_mean"])
        projector.deviation.copy_(saved["feature_deviation"])
        if saved["optimizer"] is not None:
            self._new_optimizer()
            self.optimizer.load_state_dict(saved["optimizer"])

    def save(self) -> None:
        """The state, whole or not at all."""
        projector = self.student.projector
        record = {
            "dense": self.dense,
            "step": self.step,
            "plan": asdict(self.plan),
            "mean": self.mean,
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "feature_mean": projector.mean,
            "feature_deviation": projector.deviation,
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
        }
        partial = self.state_file.with_suffix(".part")
        torch.save(record, partial)
        partial.replace(self.state_file)

    def log(self, **figures: Any) -> None:
        line = json.dumps({"at": time.strftime("%H:%M:%S"), **figures})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    # -- dense ---------------------------------------------------------------------------------------------------------

    def _stored_features(self) -> np.ndarray:
        """float16 [lessons, 576, vision width] of the first image of each training lesson; what is there is kept."""
        path, count = self.folder / "features.npy", self.plan.dense_lessons
        shape = (count, VISUAL_TOKENS, self.student.tower.config.hidden_size)
        mode: Any = "r+" if path.exists() else "w+"
        stored = np.lib.format.open_memmap(
            path, mode=mode, dtype=None if path.exists() else np.float16, shape=None if path.exists() else shape
        )
        began, made = time.time(), 0
        for first in range(0, count, 4):
            rows = range(first, min(first + 4, count))
            if np.any(stored[rows[-1], 0]):  # written last: the rows before it are complete
                continue
            images = tuple(lesson("train", number).images[0] for number in rows)
            found = self.student.features(pixels(images)).half().numpy()
            for row, one in zip(rows, found, strict=True):
                stored[row] = one
            made += len(rows)
            if first % 40 == 0:
                pace = (time.time() - began) / made
                self.log(
                    stage="features",
                    lesson=first,
                    of=count,
                    seconds=round(pace, 2),
                    hours_left=round(pace * (count - first) / 3600, 2),
                )
        stored.flush()
        return stored

    def train_dense(self) -> None:
        """The projector on stored features, where that is not done: minutes, so it is not resumed in between."""
        plan, projector = self.plan, self.student.projector
        if self.dense:
            return
        stored = self._stored_features()
        labels = [labels_of(lesson("train", number)) for number in range(len(stored))]
        labels = [{name: found[:VISUAL_TOKENS] for name, found in one.items()} for one in labels]
        projector.standardize(torch.from_numpy(stored[:: max(1, len(stored) // 100)].astype(np.float32)))
        optimizer = torch.optim.AdamW(projector.parameters(), lr=plan.dense_lr, weight_decay=0.01)
        began = time.time()
        for step in range(plan.dense_steps):
            for group in optimizer.param_groups:
                group["lr"] = (
                    plan.dense_lr
                    * min(1, (step + 1) / 50)
                    * max(0.02, 0.5 * (1 + math.cos(math.pi * step / plan.dense_steps)))
                )
            rows = np.random.default_rng(step).integers(0, len(stored), plan.dense_batch)
            visual = projector(torch.from_numpy(stored[np.sort(rows)].astype(np.float32))).flatten(0, 1)
            loss, right = self.dictionary.loss(
                visual, {n: torch.cat([labels[r][n] for r in np.sort(rows)]) for n in LABELS}
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0 or step + 1 == plan.dense_steps:
                pace = (time.time() - began) / (step + 1)
                share = {name: round(value, 3) for name, value in right.items()}
                left = round(pace * (plan.dense_steps - step) / 3600, 2)
                self.log(
                    stage="dense",
                    step=step,
                    of=plan.dense_steps,
                    loss=round(float(loss.detach()), 3),
                    right=share,
                    hours_left=left,
                )
        self.dense = plan.dense_steps
        self.mean = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.save()

    # -- language ------------------------------------------------------------------------------------------------------

    def _states(self, found: Lesson) -> tuple[Tensor, Tensor, Any]:
        """(visual tokens [tokens, D], states [T, D] that predict the packed tokens, the packed segments)."""
        student, prompts = self.student, self.prompts
        packed, words = prompts.pack(found.segments), student.words
        visual = student.projector(student.features(pixels(found.images)))
        lead = [words[prompts.before]]
        for number, one in enumerate(visual):
            lead += [words[prompts.newline], one] if number else [one]
        embeds = torch.cat([*lead, words[packed.ids]])[None]
        prefix = embeds.shape[1] - len(packed.ids)
        order = torch.arange(len(packed.ids))
        seen = (order[:, None] >= order[None]) & (packed.segment[:, None] == packed.segment[None])
        positions = torch.cat([torch.arange(prefix), prefix + packed.position])[None]
        return visual.flatten(0, 1), student(embeds, positions, seen, packed.blocks())[prefix:], packed

    def _losses(self, found: Lesson) -> tuple[Tensor, dict[str, float]]:
        """Loss of one lesson; the figures have a loss of each kind of text that it holds."""
        visual, states, packed = self._states(found)
        target = packed.labels[
            1:
        ]  # an answer never begins a segment, so the state before its first token is the segment's own
        loss, figures = self.plan.dense_weight * self.dictionary.loss(visual, labels_of(found))[0], {}
        for name, weight in (("answers", 1.0), ("described", self.plan.described_weight)):
            chosen = (target != -100) & (packed.described[1:] == (name == "described"))
            if chosen.any():
                part = F.cross_entropy(states[:-1][chosen] @ self.student.words.T, target[chosen])
                loss, figures[name] = loss + weight * part, float(part.detach())
        return loss, figures

    def _new_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=self.plan.lr, betas=(0.9, 0.98), weight_decay=0.0
        )

    def _rate(self) -> float:
        plan = self.plan
        left = 1 - self.step / plan.all_steps
        return plan.lr * min(1, (self.step + 1) / plan.warm) * max(0.03, min(1.0, left / plan.fall))

    def train_language(self, eval_every: int, eval_lessons: int) -> None:
        """The rest of the steps."""
        plan = self.plan
        if self.optimizer is None:
            self._new_optimizer()
        running: dict[str, float] = {}
        began, first, saved = time.time(), self.step, time.time()
        while self.step < plan.all_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate()
            self.optimizer.zero_grad()
            numbers, brief = plan.lessons(self.step)
            for number in numbers:
                loss, figures = self._losses(lesson("train", number, brief=brief))
                (loss / len(numbers)).backward()
                for name, value in figures.items():
                    running[name] = value if name not in running else 0.97 * running[name] + 0.03 * value
            nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
            self.optimizer.step()
            self.step += 1
            keep = min(1 - 1 / _MEAN_OVER_STEPS, self.step / (self.step + 10))
            for name, p in self.parameters.items():
                self.mean[name].lerp_(p.detach(), 1 - keep)
            pace = (time.time() - began) / (self.step - first)
            if self.step % 5 == 0 or self.step == first + 1:
                shown = {name: round(value, 3) for name, value in running.items()}
                left = round(pace * (plan.all_steps - self.step) / 3600, 2)
                self.log(
                    stage="describe" if brief else "ask",
                    step=self.step,
                    of=plan.all_steps,
                    loss=shown,
                    seconds=round(pace, 1),
                    hours_left=left,
                )
            if time.time() - saved > _SAVE_SECONDS or self.step == plan.all_steps:
                self.save()
                saved = time.time()
            if self.step % eval_every == 0 or self.step == plan.all_steps:
                self.save()
                self.log(stage="evaluation", step=self.step, **self.evaluate(eval_lessons))

    @torch.no_grad()
    def use_mean(self) -> None:
        """Put the mean weights in place of the last ones."""
        for name, p in self.parameters.items():
            p.copy_(self.mean[name])

    @torch.no_grad()
    def evaluate(self, lessons: int, first: int = 0) -> dict[str, Any]:
        """Held-out lessons with the mean weights: {"right": percent, "of": questions, "by_task": {kind: {task: [right,
        of]}}}."""
        last = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.use_mean()
        right: Counter[tuple[str, str]] = Counter()
        total: Counter[tuple[str, str]] = Counter()
        for number in range(first, first + lessons):
            found = lesson("test", number)
            _, states, packed = self._states(found)
            target = packed.labels[1:]
            chosen = target != -100
            good = (states[:-1][chosen] @ self.student.words.T).argmax(-1) == target[chosen]
            wrong = set(packed.segment[1:][chosen][~good].tolist())
            for at, segment in enumerate(found.segments, 1):
                total[found.kind, segment.task] += 1
                right[found.kind, segment.task] += at not in wrong
        for name, p in self.parameters.items():
            p.copy_(last[name])
        by_task: dict[str, dict[str, list[int]]] = {}
        for kind, task in sorted(total):
            by_task.setdefault(kind, {})[task] = [right[kind, task], total[kind, task]]
        return {"right": round(100 * right.total() / total.total(), 1), "of": total.total(), "by_task": by_task}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run: made, or gone on with")
    parser.add_argument(
        "--parts", type=Path, required=True, help="checkpoint of tools.pretrained.build with the untrained projector"
    )
    parser.add_argument(
        "--start",
        type=Path,
        help="deltas that a new run begins with; their projector too, unless they are of another kind",
    )
    parser.add_argument(
        "--steps", type=int, default=Plan.steps, help=f"ask steps of {Plan.batch} lessons (default %(default)s)"
    )
    parser.add_argument(
        "--describe-steps",
        type=int,
        default=Plan.describe_steps,
        help=f"of {Plan.describe_batch} lessons (default %(default)s)",
    )
    parser.add_argument(
        "--first-lesson",
        type=int,
        default=Plan.first_lesson,
        help="number of the first training lesson of the language stages; a run that goes on from --start begins "
        "behind those that were seen (default %(default)s)",
    )
    parser.add_argument(
        "--dense-lessons",
        type=int,
        default=Plan.dense_lessons,
        help="lessons with stored features (default %(default)s)",
    )
    parser.add_argument(
        "--dense-steps", type=int, default=Plan.dense_steps, help="steps of the dense stage (default %(default)s)"
    )
    parser.add_argument(
        "--lr", type=float, default=Plan.lr, help="peak learning rate of the language stage (default %(default)s)"
    )
    parser.add_argument("--eval-every", type=int, default=50, help="steps between evaluations (default %(default)s)")
    parser.add_argument(
        "--eval-lessons", type=int, default=2 * len(MIX), help="held-out lessons per evaluation (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    plan = Plan(
        dense_lessons=args.dense_lessons,
        dense_steps=args.dense_steps,
        first_lesson=args.first_lesson,
        describe_steps=args.describe_steps,
        steps=args.steps,
        lr=args.lr,
    )
    run = Run(args.run, args.parts, plan, args.start)
    run.train_dense()
    run.train_language(args.eval_every, args.eval_lessons)


if __name__ == "__main__":
    main()
