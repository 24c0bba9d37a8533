"""A tiny float checkpoint folder with a processor, and samples for it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quota.calib.samples import Sample, Samples
from quota.calib.work import WorkFolder
from quota.scenes.model import build_processor
from quota.scenes.qwen_model import build_processor as qwen_processor
from tests.tiny import tiny_llava, tiny_qwen


def float_folder(path: Path, tiny: Any = tiny_llava, **sizes: int) -> Path:
    """Save a tiny LLaVA (56 px, 16 visual tokens) with the scenes' processor; the processor's image token is the
    model's."""
    model = tiny(**sizes)
    processor = build_processor(56)
    model.config.image_token_index = model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def qwen_folder(path: Path, **sizes: Any) -> Path:
    """Save a tiny Qwen2.5-VL (patches of 4 px) with the scenes' processor; the processor's special tokens are the
    model's."""
    model, processor = tiny_qwen(**sizes), qwen_processor(4)
    for name, word in (
        ("image", "image_pad"),
        ("video", "video_pad"),
        ("vision_start", "vision_start"),
        ("vision_end", "vision_end"),
    ):
        setattr(model.config, f"{name}_token_id", processor.tokenizer.convert_tokens_to_ids(f"<|{word}|>"))
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def mixed_samples(
    sizes: tuple[tuple[int, int] | None, ...] = ((32, 32), (24, 16), None, (16, 40), (40, 40), (32, 16)),
) -> Samples:
    """Samples with noise of the given sizes (width, height); None is text only."""
    generator, items = np.random.default_rng(0), []
    for number, size in enumerate(sizes):
        data = io.BytesIO()
        if size is not None:
            Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(data, "PNG")
        question = "what color is the star ?" if number % 2 else "how many rows are in the picture ?"
        items.append(Sample(f"s{number}", question, None if size is None else data.getvalue(), answer="red"))
    return Samples.of(items)


def picture_samples(count: int = 6, text_only: int = 0) -> Samples:
    """`count` samples of coloured noise with questions of different lengths, the last `text_only` of them without a
    picture."""
    generator = np.random.default_rng(0)
    items = []
    for number in range(count):
        data = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(data, "PNG")
        question = "what color is the star ?" if number % 2 else "how many red stars are there ?"
        items.append(
            Sample(f"s{number}", question, data.getvalue() if number < count - text_only else None, answer="red")
        )
    return Samples.of(items)


def killed(monkeypatch: pytest.MonkeyPatch, survived: int, work: Callable[[], object]) -> None:
    """Run `work`, a calibration whose process dies at the end of step number `survived`: its files are written, the
    state does not name them."""
    real, left = WorkFolder.commit, [survived]

    def dies(self: WorkFolder) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkFolder, "commit", dies)
        work()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the steps that are finished from now on."""
    real, done = WorkFolder.commit, list[int]()

    def counts(self: WorkFolder) -> None:
        real(self)
        done.append(self.done)

    monkeypatch.setattr(WorkFolder, "commit", counts)
    return done
