"""The curriculum of the embedded Qwen2.5-VL model: as LLaVA's (dense, captions, questions, larger), over five kinds of
pages.

Every step sees all kinds, each a part of its own of pages of one size: with one kind a step their gradients undo each
other, and questions stay at their priors. Reading is learned like seeing: each visual token is first classified against
the vectors of the words and digits it shows, then whole pages are read out, then questions are asked. The tower knows
no absolute places (its rotary embedding is relative), so where things are is supervised inside the decoder, on the
visual tokens' states after its second layer, which M-RoPE has reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from quota.models.qwen_tower import geometry_of, tower_rotary
from quota.scenes import generate as g
from quota.scenes import kinds as k
from quota.scenes.pages import WORD_CLASSES
from quota.scenes.qwen_model import LAYERS, WIDTH, build_config, build_model, build_processor
from quota.scenes.vocabulary import (
    CAPTION_REQUEST,
    COLORS,
    QWEN_PATCH_SIZE,
    QWEN_TOKEN_PX,
    QWEN_WORDS,
    READ_REQUEST,
    SHAPES,
)
from tools.scenes.training import CLIP_MEAN, CLIP_STD, HARD_MIX, Family, Stage, block_mask

_IDS = {word: i for i, word in enumerate(QWEN_WORDS)}
BEFORE_PICTURE = ("<|im_start|>", "user", "<|vision_start|>")
ANSWER_TURN = "<|im_end|> <|im_start|> assistant"
_PLACE_LAYER = 1  # the decoder layer after which places are supervised


@dataclass(frozen=True)
class MixedStage(Stage):
    """`mix`: (kind, share of a step's pages); conversation images are `size_px` square, pages come in their own
    sizes."""

    mix: tuple[tuple[str, float], ...] = ((k.CONVERSATION, 1.0),)

    def pages(self) -> list[tuple[str, int]]:
        """Kind and number of pages of every part of a step; together `batch`."""
        ends = [int(sum(share for _, share in self.mix[: n + 1]) * self.batch + 0.5) for n in range(len(self.mix))]
        return [
            (kind, end - begin)
            for (kind, _), begin, end in zip(self.mix, [0, *ends], ends, strict=False)
            if end > begin
        ]


_SEEN = ((k.CONVERSATION, 0.4), ("scene_text", 0.2), ("document", 0.2), ("chart", 0.2))
_ALL = ((k.CONVERSATION, 0.375), (k.TEXT, 0.125), ("scene_text", 0.125), ("document", 0.25), ("chart", 0.125))
SCHEDULE = (
    MixedStage("dense", 700, 160, 16, 2e-3, dense_weight=1.0, language=False, mix=_SEEN),
    MixedStage("caption", 1200, 160, 16, 1.5e-3, dense_weight=0.3, mix=_SEEN),
    MixedStage("questions", 1700, 160, 16, 1.5e-3, questions_per_task=3, caption_share=0.3, dense_weight=0.1, mix=_ALL),
    MixedStage(
        "questions-320",
        1000,
        320,
        8,
        8e-4,
        questions_per_task=4,
        caption_share=0.3,
        dense_weight=0.2,
        hard_tasks=True,
        mix=_ALL,
    ),
)


def encode(text: str) -> list[int]:
    return [_IDS[word] for word in text.split()]


class MixedPages(IterableDataset):
    """Endless steps of one stage, starting at page `first`: {"parts": one batch for each kind}, of them those of
    process `rank` of `world`."""

    def __init__(self, stage: MixedStage, first: int, rank: int = 0, world: int = 1) -> None:
        self.stage, self.first, self.rank, self.world = stage, first, rank, world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index = self.first
        while True:
            planned = []  # kind, size, first page, pages
            for kind, pages in self.stage.pages():
                planned.append((kind, choose_size(self.stage, kind, index), index, pages))
                index += pages
            mine = share_out(
                [pages * tokens_of(kind, size_px, self.stage) for kind, size_px, _, pages in planned], self.world
            )[self.rank]
            parts = [
                collate(kind, size_px, range(begin, begin + pages), self.stage)
                for kind, size_px, begin, pages in (planned[i] for i in mine)
            ]
            yield {"parts": parts}


def share_out(work: list[int], world: int) -> list[list[int]]:
    """Which pieces each of `world` processes does: the largest piece first, to whoever has least."""
    shares: list[list[int]] = [[] for _ in range(world)]
    for piece in sorted(range(len(work)), key=lambda i: -work[i]):
        min(shares, key=lambda share: sum(work[i] for i in share)).append(piece)
    return [sorted(share) for share in shares]


def tokens_of(kind: str, size_px: tuple[int, int], stage: MixedStage) -> int:
    """About how many tokens a page of this kind is, with its packed text: a conversation has a question of every
    task."""
    visual = 0 if kind == k.TEXT else size_px[0] * size_px[1] // QWEN_TOKEN_PX**2
    return visual + ((270 if kind == k.CONVERSATION and stage.questions_per_task else 100) if stage.language else 0)


def choose_size(stage: MixedStage, kind: str, index: int) -> tuple[int, int]:
    """Width and height in pixels of the part that starts at page `index`."""
    sizes = ((stage.size_px, stage.size_px),) if kind == k.CONVERSATION else k.PAGES[kind].sizes
    return sizes[int(g.seeded("train", index, "batch", 0).integers(len(sizes)))]


def collate(kind: str, size_px: tuple[int, int], indices: range, stage: MixedStage) -> dict[str, Any]:
    """Images [B, H, W, 3] uint8 with labels shape, color, word [B, V] (absent for text), and the packed text: ids,
    labels, segment, positions [B, T]."""
    batch: dict[str, Any] = {"kind": kind, "pages": len(indices)}
    if kind != k.TEXT:
        batch["pixels"] = torch.from_numpy(np.stack([np.asarray(k.image(kind, "train", i, size_px)) for i in indices]))
        seen = [k.dense_labels(kind, "train", i, size_px) for i in indices]
        for number, name in enumerate(("shape", "color", "word")):
            batch[name] = torch.from_numpy(np.stack([row[number] for row in seen]))
    if not stage.language:
        return batch
    start = (
        2 if kind == k.TEXT else len(BEFORE_PICTURE) + max(size_px) // QWEN_TOKEN_PX + 1
    )  # after the image: its longer side, then its end marker
    rows = []
    for i in indices:
        row: list[tuple[int, int, int, int]] = []  # (id, label, segment, position) per text token
        for number, (prompt, answer) in enumerate(segments_of(kind, i, size_px, stage), start=1):
            labels = [-100] * len(prompt) + answer
            row.extend(
                (t, label, number, start + at)
                for at, (t, label) in enumerate(zip(prompt + answer, labels, strict=True))
            )
        rows.append(row)
    length = math.ceil(max(len(r) for r in rows) / 16) * 16
    packed = torch.tensor([r + [(_IDS["<|endoftext|>"], -100, -1, 0)] * (length - len(r)) for r in rows])
    for number, name in enumerate(("ids", "labels", "segment", "positions")):
        batch[name] = packed[..., number].contiguous()
    return batch


def segments_of(
    kind: str, index: int, size_px: tuple[int, int], stage: MixedStage
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of every segment packed behind this page."""
    if kind == k.CONVERSATION:
        s = g.scene("train", index, size_px[0])
        rng = s.seed("training questions")
        request, caption = CAPTION_REQUEST, g.caption(s, rng)
        wanted: int | Mapping[str, int] = HARD_MIX if stage.hard_tasks else stage.questions_per_task
        asked = g.questions(s, wanted, rng) if stage.questions_per_task else []
    else:
        found, rule = k.page(kind, "train", index, size_px), k.PAGES[kind]
        rng = found.seed("training questions")
        request, caption = READ_REQUEST, rule.caption(found, rng) if rule.caption else ""
        asked = list(dict.fromkeys(q for _ in range(stage.questions_per_task) for q in rule.questions(found, rng)))
    pairs = [(q.text, q.answer) for q in asked]
    if caption and (not pairs or rng.random() < stage.caption_share):
        pairs.insert(0, (request, caption))
    return [(encode(f"{text} {ANSWER_TURN}"), encode(f"{answer} <|im_end|>")) for text, answer in pairs]


# -- the model in training
# ---------------------------------------------------------------------------------------------------------------


class DenseHead(nn.Module):
    """Classifies visual tokens against word vectors: shape, colour and rendered word, or a learned background vector
    each. Not saved.

    `places`: the same for top or bottom and left or right, and finer, on the decoder's states.
    """

    _BINS = 8
    _CLASSES = (SHAPES, tuple(COLORS), WORD_CLASSES)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.background = nn.Parameter(torch.randn(3, width) * width**-0.5)
        self.lines = nn.Parameter(torch.randn(2, self._BINS, width) * width**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, tokens: Tensor, words: Tensor, targets: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """tokens [B, V, D], targets: three [B, V] -> (loss, share of labelled tokens that are right)."""
        tokens, loss, right, count = tokens.float(), tokens.new_zeros((), dtype=torch.float32), 0.0, 0
        for number, (names, target) in enumerate(zip(self._CLASSES, targets, strict=True)):
            logits = self._logits(
                tokens, torch.cat([words[[_IDS[n] for n in names]], self.background[number : number + 1]])
            )
            wanted = torch.where(target == -1, len(names), target).masked_fill(target == -2, -100)
            balance = torch.ones(len(names) + 1, device=tokens.device)
            balance[-1] = 0.15  # most tokens are background
            loss = loss + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight=balance, ignore_index=-100)
            labelled = target >= 0
            right, count = right + float((logits.argmax(-1) == target)[labelled].sum()), count + int(labelled.sum())
        return loss, torch.tensor(right / max(1, count))

    def place_loss(self, states: Tensor, words: Tensor, shape: Tensor) -> Tensor:
        """states [B, V, D] of square images: their own row and column, said mostly by the tokens that show an
        object."""
        states, side = states.float(), math.isqrt(states.shape[1])
        raster = torch.arange(states.shape[1], device=states.device).expand(len(states), -1)
        share = torch.where(shape >= 0, 1.0, 0.05)
        share, loss = share / share.sum(), states.new_zeros(())
        for number, (ends, line) in enumerate(
            ((("top", "bottom"), raster // side), (("left", "right"), raster % side))
        ):
            coarse, fine = (
                self._logits(states, words[[_IDS[n] for n in ends]]),
                self._logits(states, self.lines[number]),
            )
            for logits, wanted, weight in ((coarse, line * 2 // side, 1.0), (fine, line * self._BINS // side, 0.3)):
                loss = loss + weight * (F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none") * share).sum()
        return loss

    def _logits(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        return tokens @ vectors.float().T * self.log_scale.exp()


def patches(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, patches, 3 * 2 * p * p] float32 as the processor makes them: normalised, four patches
    of a token together."""
    mean, std = (torch.tensor(v, device=pixels.device) for v in (CLIP_MEAN, CLIP_STD))
    x = pixels.float().div(255).sub(mean).div(std)
    b, height, width, _ = x.shape
    p = QWEN_PATCH_SIZE
    x = x.view(b, height // (2 * p), 2, p, width // (2 * p), 2, p, 3).permute(
        0, 1, 4, 2, 5, 7, 3, 6
    )  # row, column, inner row, inner column, channel, y, x
    return x[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(b, -1, 6 * p * p)


def tower(visual: Any, pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> visual tokens [B, V, D]: what the upstream tower computes, all windows of a batch at once.

    Sizes must be multiples of the window, so that all windows are alike.
    """
    config, x = visual.config, patches(pixels)
    grid = (1, pixels.shape[1] // QWEN_PATCH_SIZE, pixels.shape[2] // QWEN_PATCH_SIZE)
    where = geometry_of(config, grid)
    if len(set(where.windows)) != 1:
        raise ValueError(
            f"pixels: expected a multiple of {config.window_size} px, got {pixels.shape[2]} x {pixels.shape[1]}"
        )
    cos, sin = (t.to(x.device) for t in tower_rotary(where, config))
    x = F.linear(x, visual.patch_embed.proj.weight.flatten(1))
    b, n, width = x.shape
    x = x.view(b, n // 4, 4, width)[:, where.order].view(b, n, width)
    for number, block in enumerate(visual.blocks):
        window = n if number in config.fullatt_block_indexes else where.windows[0]
        q, key, v = block.attn.qkv(block.norm1(x)).view(b, n, 3, config.num_heads, -1).unbind(2)
        q, key = apply_rotary_pos_emb_vision(q, key, cos, sin)
        q, key, v = (t.reshape(b * n // window, window, config.num_heads, -1).transpose(1, 2) for t in (q, key, v))
        out = F.scaled_dot_product_attention(q, key, v).transpose(1, 2).reshape(b, n, width)
        x = x + block.attn.proj(out)
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x.view(b * n, width)).view(b, n // 4, -1)[:, where.inverse]


def forward(
    model: Any, head: DenseHead, batch: dict[str, Any], stage: MixedStage, amp: bool
) -> tuple[Tensor, dict[str, float]]:
    """Loss and figures of one step: its parts, weighed by their pages."""
    losses: list[Tensor] = []
    figures: dict[str, float] = {}
    for part in batch["parts"]:
        loss, seen = part_loss(model, head, part, stage, amp)
        losses.append(loss * (part["pages"] / stage.batch))
        figures |= seen
    return torch.stack(losses).sum(), figures


def part_loss(
    model: Any, head: DenseHead, batch: dict[str, Any], stage: MixedStage, amp: bool
) -> tuple[Tensor, dict[str, float]]:
    """Loss and figures of pages of one kind with their packed questions."""
    device, kind = model.device, batch["kind"]
    words = model.get_input_embeddings().weight
    loss, figures = words.new_zeros(()), {}
    visual = None
    if "pixels" in batch:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            visual = tower(model.model.visual, batch["pixels"].to(device))
        dense, right = head(visual, words, tuple(batch[name].to(device) for name in ("shape", "color", "word")))
        loss, figures = stage.dense_weight * dense, {f"dense_{kind}": float(right)}
    if not stage.language:
        return loss, figures
    ids, labels = batch["ids"].to(device), batch["labels"].to(device)
    embeds, positions, prefix = _inputs(words, visual, batch, ids)
    seen: list[Tensor] = []
    hook = model.model.language_model.layers[_PLACE_LAYER].register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        mask = block_mask(batch["segment"].to(device), prefix)
        out = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask.to(torch.bfloat16) if amp else mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
    hook.remove()
    target = labels[:, 1:]
    chosen = target != -100
    logits = model.lm_head(out[:, prefix:-1][chosen].float())
    text_loss = F.cross_entropy(logits, target[chosen])
    figures |= {
        f"loss_{kind}": float(text_loss.detach()),
        f"right_{kind}": float((logits.argmax(-1) == target[chosen]).float().mean()),
    }
    if kind == k.CONVERSATION and visual is not None:
        states = seen[0][:, len(BEFORE_PICTURE) : len(BEFORE_PICTURE) + visual.shape[1]]
        loss = loss + stage.dense_weight * head.place_loss(states, words, batch["shape"].to(device))
    return loss + text_loss, figures


def _inputs(words: Tensor, visual: Tensor | None, batch: dict[str, Any], ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """Embeddings [B, S, D], M-RoPE positions [3, B, S] and the length of what all segments share."""
    b, device = len(ids), ids.device
    text = batch["positions"].to(device).expand(3, -1, -1)
    if visual is None:
        lead = words[[_IDS[w] for w in BEFORE_PICTURE[:2]]].expand(b, -1, -1)
        return (
            torch.cat([lead, words[ids]], 1),
            torch.cat([torch.arange(2, device=device).expand(3, b, -1), text], -1),
            2,
        )
    rows, columns = (batch["pixels"].shape[axis] // QWEN_TOKEN_PX for axis in (1, 2))
    first = len(BEFORE_PICTURE)
    raster = torch.arange(rows * columns, device=device)
    image = torch.stack([torch.zeros_like(raster), raster // columns, raster % columns]) + first
    begin, end = (
        torch.arange(first, device=device).expand(3, -1),
        torch.full((3, 1), first + max(rows, columns), device=device),
    )
    shared = torch.cat([begin, image, end], -1)[:, None].expand(3, b, -1)
    lead, close = (words[[_IDS[w] for w in names]].expand(b, -1, -1) for names in (BEFORE_PICTURE, ("<|vision_end|>",)))
    embeds = torch.cat([lead, visual.to(words.dtype), close, words[ids]], 1)
    return embeds, torch.cat([shared, text], -1), shared.shape[-1]


def save_checkpoint(model: Any, out: Path) -> None:
    """The final artefact: float16 weights with processor, loadable by `quota.load`."""
    copy: Any = Qwen2_5_VLForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(out)
    build_processor().save_pretrained(out)


FAMILY = Family(
    SCHEDULE,
    WIDTH,
    LAYERS,
    lambda stage, width, layers, seed: build_model(build_config(width, layers), seed),
    DenseHead,
    MixedPages,
    forward,
    lambda model, stage, width, layers: model,
    save_checkpoint,
)
