"""Dense supervision: every visual token becomes the sum of the word vectors of what it shows, so that the language
model reads images as text from its first step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quota.scenes import crowds
from quota.scenes.pages import WORD_CLASSES
from quota.scenes.vocabulary import COLORS, SHAPES
from tools.pretrained.lessons import LABELS, Lesson
from tools.pretrained.parts import PATCH_PX, SIZE_PX, VISUAL_TOKENS

CLASSES: dict[str, tuple[str, ...]] = {
    "size": tuple(crowds.RADII_PX),
    "texture": crowds.TEXTURES,
    "color": tuple(COLORS),
    "shape": SHAPES,
    "word": WORD_CLASSES,
}
WEIGHT = {"size": 0.6, "texture": 0.6, "color": 1.0, "shape": 1.0, "word": 1.2}
_NOTHING, _PLACE_WEIGHT, _SHARPNESS = "nothing", 0.5, 16.0


class Dictionary:
    """Word vectors that dense supervision aims at."""

    def __init__(self, words: Tensor, tokenizer: Any) -> None:
        def vectors(names: Any) -> Tensor:
            return torch.stack(
                [words[tokenizer(f" {name}", add_special_tokens=False).input_ids].mean(0) for name in names]
            )

        self.classes = {name: vectors(names) for name, names in CLASSES.items()}
        self.directions = {name: F.normalize(v - v.mean(0), dim=-1) for name, v in self.classes.items()}
        self.nothing, self.variance = vectors([_NOTHING])[0], float(words.var())
        side = SIZE_PX // PATCH_PX
        raster = torch.arange(VISUAL_TOKENS)
        vertical, horizontal = vectors(["top", "bottom"]), vectors(["left", "right"])
        half = side / 2
        self.place = vertical[(raster // side >= half).long()] + horizontal[(raster % side >= half).long()]

    def loss(self, visual: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """visual [tokens, D] of whole images, labels int64 [tokens] -> (loss, share of labelled tokens nearest to their
        word, by attribute)."""
        target, known, open_ = (
            torch.zeros_like(visual),
            torch.zeros(len(visual), dtype=torch.bool),
            torch.zeros(len(visual), dtype=torch.bool),
        )
        loss, right = visual.new_zeros(()), {}
        directed = F.normalize(visual, dim=-1) * _SHARPNESS
        for name, vectors in self.classes.items():
            label = labels[name]
            there = label >= 0
            open_ |= label == -2
            if not there.any():
                continue
            target[there] += WEIGHT[name] * vectors[label[there]]
            known |= there
            logits = directed[there] @ self.directions[name].T
            loss = loss + WEIGHT[name] * F.cross_entropy(logits, label[there])
            right[name] = float((logits.argmax(-1) == label[there]).float().mean())
        place = self.place.repeat(len(visual) // VISUAL_TOKENS, 1)
        target = torch.where(known[:, None], target + _PLACE_WEIGHT * place, self.nothing)
        weight = torch.where(known, 4.0, torch.where(open_, 0.0, 0.3))
        square = ((visual - target.detach()) ** 2).mean(-1) / self.variance
        return loss + (square * weight).sum() / weight.sum(), right


def labels_of(found: Lesson) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(found.labels[name])).long() for name in LABELS}
