"""The numbers of a calibration run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quota.core.errors import UsageError


@dataclass(frozen=True)
class Method:
    """How a block is quantized. learns: transforms and clips, in steps; else weights alone are rounded. samples: it
    reads any. search: roughly, products with a block's own weights that searching or factoring costs, per search
    row; not fitted to runs."""

    learns: bool = False
    samples: bool = True
    search: int = 0


# What a method makes: the row of `quota.core.formats.SCHEMES` that lists it.
METHODS = {
    "flatquant": Method(learns=True, search=12),
    "gptq": Method(search=4),
    "awq": Method(search=40),
    "rtn": Method(samples=False, search=2),
}


@dataclass(frozen=True)
class Settings:
    """Calibration settings; every field is part of the resume key, so changing one starts over.

    steps: optimiser steps per block (0 keeps the searched initial values). batch: samples per step. search_rows: tokens
    used by the one-dimensional clip searches. held_out: samples kept out of training, on which the best iterate is
    chosen. evaluate_every: steps between two such looks. matrix_lr, clip_lr: AdamW rates (cosine decay) for the
    transforms and for the clip logits. text_share: where images and text share the stream, the share of the loss that
    text tokens have together; None: every token counts alike. relative: divide each token's squared error by its float
    output's mean square, so that large tokens do not outweigh the others. inputs: what a block sees while it learns to
    reproduce the float block's output on the float input: "float" (as published), "quantized" (the output of the
    already quantized blocks) or "mixed" (both, half of the batch each). The weight-only methods look at "float" or
    "quantized" inputs and have no steps; of the other settings they use search_rows (AWQ) and held_out. stream_dtype:
    storage of hidden states between blocks. device: where blocks run.
    """

    steps: int = 60
    batch: int = 4
    search_rows: int = 1024
    held_out: int = 8
    evaluate_every: int = 20
    matrix_lr: float = 5e-3
    clip_lr: float = 5e-2
    diag_alpha: float = 0.3
    text_share: float | None = None
    relative: bool = False
    inputs: str = "float"
    stream_dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        _expect(
            self.inputs in ("float", "quantized", "mixed"), "inputs", "'float', 'quantized' or 'mixed'", self.inputs
        )
        _expect(
            self.stream_dtype in ("float32", "float16"), "stream_dtype", "'float32' or 'float16'", self.stream_dtype
        )
        _expect(self.steps >= 0, "steps", ">= 0", self.steps)
        for name in ("batch", "search_rows", "held_out", "evaluate_every"):
            _expect(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        _expect(self.text_share is None or 0 < self.text_share < 1, "text_share", "in (0, 1) or None", self.text_share)
        _expect(0 <= self.diag_alpha <= 1, "diag_alpha", "in [0, 1]", self.diag_alpha)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        return asdict(self)


def default_settings(method: str) -> Settings:
    """As published: GPTQ's Hessians come from inputs that the blocks before, already quantized, made."""
    return Settings(inputs="quantized") if method == "gptq" else Settings()


def _expect(ok: bool, field: str, expected: str, got: object) -> None:
    if not ok:
        raise UsageError(f"calibration setting {field}: expected {expected}, got {got!r}")
