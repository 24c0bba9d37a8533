"""A tiny float checkpoint folder with a processor, and samples for it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from quota.calib.samples import Sample, Samples
from quota.scenes.model import build_processor
from tests.models import tiny_llava


def float_folder(path: Path, **sizes: int) -> Path:
    """Save a tiny LLaVA (56 px, 16 visual tokens) with the scenes' processor; the processor's image token is the model's."""
    model = tiny_llava(**sizes)
    processor = build_processor(56)
    model.config.image_token_index = model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def picture_samples(count: int = 6, text_only: int = 0) -> Samples:
    """`count` samples of coloured noise with questions of different lengths, the last `text_only` of them without a picture."""
    generator = np.random.default_rng(0)
    items = []
    for number in range(count):
        data = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(data, "PNG")
        question = "what color is the star ?" if number % 2 else "how many red stars are there ?"
        items.append(Sample(f"s{number}", question, data.getvalue() if number < count - text_only else None, answer="red"))
    return Samples.of(items)
