"""The embedded LLaVA in training: images with packed questions, the dense head, one step's loss. The loop is
`tools.scenes.train`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import LlavaForConditionalGeneration

from quota.scenes import generate as g
from quota.scenes.model import build_config, build_model, build_processor
from quota.scenes.vocabulary import CAPTION_REQUEST, COLORS, PATCH_SIZE, SHAPES, WORDS
from tools.scenes.training import CLIP_MEAN, CLIP_STD, HARD_MIX, Family, Stage, block_mask

_IDS = {word: i for i, word in enumerate(WORDS)}
PREFIX = ("<s>", "user", ":")
SCHEDULE = (
    Stage("dense", 1000, 168, 16, 2e-3, dense_weight=1.0, language=False),
    Stage("caption", 1300, 168, 16, 1.5e-3, dense_weight=0.3),
    Stage("questions", 1900, 168, 16, 1.5e-3, questions_per_task=3, caption_share=0.3, dense_weight=0.1),
    Stage(
        "questions-336", 1050, 336, 8, 8e-4, questions_per_task=4, caption_share=0.3, dense_weight=0.3, hard_tasks=True
    ),
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


class Images(IterableDataset):
    """Endless batches for one stage, starting at image `first`: of every step's images those of process `rank` of
    `world`."""

    def __init__(self, stage: Stage, first: int, rank: int = 0, world: int = 1) -> None:
        self.stage, self.first, self.rank, self.world = stage, first, rank, world

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        index = self.first
        while True:
            scenes = [
                g.scene("train", index + i, self.stage.size_px) for i in range(self.rank, self.stage.batch, self.world)
            ]
            index += self.stage.batch
            yield collate(scenes, self.stage)


def collate(scenes: list[g.Scene], stage: Stage) -> dict[str, Tensor]:
    """Images [B, size, size, 3] uint8, dense labels [B, V], and the packed text: ids, labels, segment, positions [B,
    T]."""
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
    """Classifies visual tokens against word vectors: shape, colour (or a learned background vector), top or bottom,
    left or right.

    Finer places have learned vectors of their own (`_BINS` rows and columns), so that "left of" can be read off a
    token. Not saved.
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
        share = torch.where(
            shape >= 0, 1.0, 0.05
        )  # the place of an object must be said by its own tokens, and they are few
        share = share / share.sum()
        for i, (ends, line) in enumerate(((("top", "bottom"), raster // side), (("left", "right"), raster % side))):
            coarse, fine = self._logits(tokens, words[[_IDS[n] for n in ends]]), self._logits(tokens, self.places[i])
            for logits, wanted, weight in ((coarse, line * 2 // side, 1.0), (fine, line * self._BINS // side, 0.3)):
                loss = loss + weight * (F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none") * share).sum()
            right &= coarse.argmax(-1) == line * 2 // side
        return loss, right[shape >= 0].float().mean()

    def _logits(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        return tokens @ vectors.float().T * self.log_scale.exp()


def forward(
    model: Any, head: DenseHead, batch: dict[str, Tensor], stage: Stage, amp: bool
) -> tuple[Tensor, dict[str, float]]:
    """Loss and figures of one packed batch; the loss is weighed by the batch's share of the step's images."""
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
            inputs_embeds=embeds,
            attention_mask=mask.to(torch.bfloat16) if amp else mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
    target = labels[:, 1:]
    chosen = target != -100
    logits = model.lm_head(out[:, prefix:-1][chosen].float())
    loss = F.cross_entropy(logits, target[chosen])
    figures["text_loss"], figures["token_right"] = (
        float(loss.detach()),
        float((logits.argmax(-1) == target[chosen]).float().mean()),
    )
    return (loss + stage.dense_weight * dense_loss) * share, figures


def enlarge(model: Any, size_px: int, width: int, layers: int) -> Any:
    """The same weights at another image size: patch position embeddings are interpolated."""
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


def _resize(model: Any, stage: Stage, width: int, layers: int) -> Any:
    return (
        model
        if model.config.vision_config.image_size == stage.size_px
        else enlarge(model, stage.size_px, width, layers)
    )


FAMILY = Family(
    SCHEDULE,
    192,
    8,
    lambda stage, width, layers, seed: build_model(build_config(stage.size_px, width, layers), seed),
    DenseHead,
    Images,
    forward,
    _resize,
    save_checkpoint,
)
