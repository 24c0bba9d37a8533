"""Tiny float checkpoint folders with their processors, samples for them, and what happens to a calibration."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    GotOcr2ImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    PreTrainedTokenizerFast,
)

from quota.calib.blocks import Batch
from quota.calib.job import Job
from quota.calib.samples import Sample, Samples, encode
from quota.calib.schedule import Schedule
from quota.calib.settings import Settings
from quota.calib.steps import Ticks
from quota.calib.stream import FloatSource
from quota.calib.work import WorkFolder
from quota.core.recipe import Recipe
from quota.models import find_family
from quota.prune.pruner import Pruner
from quota.runtime import load
from quota.scenes.model import build_processor
from quota.scenes.qwen_model import build_processor as qwen_processor
from tests.speaking import paligemma_processor, pixtral_processor
from tests.tiled import TILE_PX
from tests.tiny import TINY, tiny_llava, tiny_paligemma, tiny_qwen

QUICK = Settings(steps=4, evaluate_every=2, batch=2, search_rows=64, held_out=1)


def float_folder(path: Path, tiny: Any = tiny_llava, **sizes: int) -> Path:
    """Save a tiny LLaVA (56 px, 16 visual tokens) with the scenes' processor; the processor's image token is the
    model's, its count of rows the tower's."""
    model = tiny(**sizes)
    processor = build_processor(56)
    processor.num_additional_image_tokens = find_family(model).class_tokens
    processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
    model.config.image_token_index = model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def qwen_folder(path: Path, tiny: Any = tiny_qwen, **sizes: Any) -> Path:
    """Save a tiny Qwen-VL (patches of 4 px) with the scenes' processor as one of its own class; the processor's special
    tokens are the model's."""
    model, parts = tiny(**sizes), qwen_processor(4)
    processor = find_family(model).processor_class(image_processor=parts.image_processor, tokenizer=parts.tokenizer)
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


def pixtral_folder(path: Path, tiny: Any, **sizes: Any) -> Path:
    """Save a tiny model with a Pixtral tower (patches of 4 px) with the scenes' words; the processor's image token is
    the model's."""
    model = tiny(**sizes)
    processor = pixtral_processor(find_family(model).merge)
    model.config.image_token_index = processor.image_token_id
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def paligemma_folder(path: Path) -> Path:
    """Save a tiny PaliGemma (56 px, 16 visual tokens) with the scenes' words; the processor's image token is the
    model's."""
    model, processor = tiny_paligemma(), paligemma_processor()
    model.config.image_token_index = processor.image_token_id
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def tiled_folder(path: Path, name: str, **options: Any) -> Path:
    """Save a tiny model of a family in tiles with upstream's processor of its sizes; the processor's special tokens are
    the model's."""
    model = TINY[name][0](**options)
    processor = _tiled_processor(model)
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    setattr(
        model.config, "image_token_index" if hasattr(model.config, "image_token_index") else "image_token_id", token
    )
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def _tiled_processor(model: Any) -> Any:
    family, tokenizer = find_family(model), build_processor(56).tokenizer
    square, template = {"height": TILE_PX, "width": TILE_PX}, build_processor(56).chat_template
    if family.name != "llava_next":
        names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
        marks = dict(zip(names, ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), strict=True))
        if family.name == "llava_onevision":
            marks = {"image_token": "<image>", "video_token": "<video>"}
        special = {name: getattr(tokenizer, name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, padding_side="left", extra_special_tokens=marks, **special
        )
    if family.name == "internvl":
        return family.processor_class(
            image_processor=GotOcr2ImageProcessorPil(size=square, max_patches=4),
            tokenizer=tokenizer,
            image_seq_length=family.tile_tokens,
            chat_template=template.replace("<image>", "<IMG_CONTEXT>"),
        )
    resolutions = model.config.image_grid_pinpoints
    if family.name == "llava_onevision":
        return family.processor_class(
            image_processor=LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=resolutions),
            tokenizer=tokenizer,
            num_image_tokens=family.tile_tokens,
            vision_feature_select_strategy="full",
            chat_template=template,
            vision_aspect_ratio=model.config.vision_aspect_ratio,
        )
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE_PX}, crop_size=square, image_grid_pinpoints=resolutions
        ),
        tokenizer=tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )


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


# per family: its folder, its samples, and what makes its model hard to quantize
MADE: dict[str, tuple[Callable[..., Path], Callable[..., Samples], dict[str, Any]]] = {
    "llava": (float_folder, picture_samples, {}),
    "qwen2_5_vl": (qwen_folder, mixed_samples, {"key_bias": 800}),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def batch_for(family: str, kind: str) -> Batch:
    """Two rows of noise for a block of a kind; where resolution is dynamic, of two sizes and with rotary positions that
    differ by axis."""
    generator = torch.Generator().manual_seed(0)
    if family == "llava":
        width = 64 if kind == "decoder" else 32
        hidden = torch.randn(2, 17, width, generator=generator)
        return Batch(hidden, torch.ones(2, 17, dtype=torch.bool), torch.arange(17).expand(2, 17))
    if kind == "vision":
        valid = torch.arange(64)[None] < torch.tensor([[64], [24]])
        return Batch(torch.randn(2, 64, 32, generator=generator), valid, grids=[(1, 8, 8), (1, 4, 6)])
    if kind == "projector":
        return Batch(torch.randn(2, 16, 128, generator=generator), torch.ones(2, 16, dtype=torch.bool))
    positions = torch.stack([torch.arange(17), torch.arange(17) // 3, torch.arange(17) % 5], -1)
    hidden = torch.randn(2, 17, 64, generator=generator)
    return Batch(hidden, torch.ones(2, 17, dtype=torch.bool), positions.expand(2, -1, -1))


def scramble(block: Any, seed: int = 3) -> None:
    """Random well-conditioned transforms and diagonals: far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.matrices():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                more = torch.randn(parameter.shape, generator=generator) / parameter.shape[0] ** 0.5
                parameter.copy_(torch.linalg.qr(noise)[0] + 0.1 * more)
            else:
                parameter.copy_(0.5 * noise)


def relative(out: Tensor, wanted: Tensor) -> float:
    return float(((out - wanted).norm() / wanted.norm()).detach())


def recipe_for(source: FloatSource, **changes: Any) -> Recipe:
    """Half of the visual tokens after two layers of four."""
    tokens = source.family.visual_tokens or 12
    model = {
        "architecture": source.family.model_class,
        "fingerprint": source.fingerprint,
        "layers": 4,
        "visual_tokens": tokens,
    }
    data = {
        "method": "uniform",
        "regime": "w4a4kv4",
        "model": model,
        "candidates": [1, 2],
        "keep": [0.75, 0.5],
        "final_keep": 0.5,
        "tau": 1.0,
        "reference_tokens": tokens,
        "weights": {"inter": 0.5, "mag": 0.3, "intra": 0.2, "quant": 0.0},
    }
    return Recipe.parse({**data, **changes})


def selected(
    *selections: dict[str, Any],
    candidates: tuple[int, ...] = (1, 2),
    keep: tuple[float, ...] = (0.75, 0.5),
    method: str = "custom",
    **fields: Any,
) -> dict[str, Any]:
    """Changes of a recipe: these selections."""
    return dict(
        method=method,
        candidates=list(candidates),
        keep=list(keep),
        final_keep=keep[-1],
        selections=list(selections),
        **fields,
    )


def assert_stream_keeps(folder: Path, samples: Samples, root: Path, changes: dict[str, Any]) -> None:
    """The tokens the stream loses are those the installed recipe drops from the float model, and the hidden states
    agree."""
    source = FloatSource(folder)
    recipe = recipe_for(source, **changes)
    schedule = Schedule(Job(source, samples, root / "out", replace(QUICK, steps=0), recipe=recipe))
    work = WorkFolder(root / "work", {})
    with schedule.bar(work, progress=False) as bar:
        for step in schedule.steps[:-1]:
            work.hand_on(step.run(schedule.job, work, Ticks(bar, 0.0, 0.0)).streams)
            work.commit()
    assert schedule.steps[-1].path == source.family.blocks("decoder")[-1]
    stream = work.streams["float"]  # input of the last layer
    model = load(folder)
    pruner, seen = Pruner(model, recipe), []
    last = model.model.language_model.layers[3]
    last.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for item, sample in enumerate(samples):
        inputs = encode(schedule.job.processor, sample, answer=True)
        with torch.no_grad():
            model(**inputs)
        kept = pruner.kept[recipe.candidates[-1]][0]
        assert (int(kept.sum()) < len(kept)) or recipe.reference == "recorded" or not source.family.images(inputs)
        assert stream.columns[stream.rows(item)].tolist() == kept.nonzero()[:, 0].tolist()
        if recipe.position_policy == "original" and source.family.visual_tokens:  # one axis: the place
            places = kept.nonzero()[:, 0] + source.family.first_position
            assert stream.positions[stream.rows(item)].tolist() == places.tolist()
        assert stream.lengths[item] == int(kept.sum())
        torch.testing.assert_close(stream.read(item), seen[item][0], rtol=1e-4, atol=1e-4)
