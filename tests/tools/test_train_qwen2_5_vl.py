"""The second family's training sees what inference does; its fast tower is the upstream one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quota.scenes import kinds as k
from quota.scenes.qwen_model import build_config, build_model, build_processor
from quota.scenes.vocabulary import QWEN_WORDS
from tools.scenes import qwen2_5_vl as q
from tools.scenes import train as t

TINY = q.MixedStage("tiny", 2, 160, 2, 1e-3, questions_per_task=1, caption_share=1.0, dense_weight=0.1, mix=q._ALL)


@pytest.fixture(scope="module")
def model():
    return build_model(build_config(width=192, layers=2)).eval()


@pytest.mark.parametrize(("kind", "size"), [("chart", (240, 160)), (k.CONVERSATION, (160, 160))])
def test_tower_is_upstreams(model, kind, size):
    processor, batch = build_processor(), q.collate(kind, size, range(2), TINY)
    pictures = [k.image(kind, "train", i, size) for i in range(2)]
    inputs = processor(text=["<|image_pad|>"] * 2, images=pictures, return_tensors="pt", padding=True)
    torch.testing.assert_close(q.patches(batch["pixels"]).flatten(0, 1), inputs["pixel_values"], atol=1e-5, rtol=0)
    with torch.no_grad():
        wanted = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        torch.testing.assert_close(
            q.tower(model.model.visual, batch["pixels"]).flatten(0, 1), wanted, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(("kind", "size"), [("document", (160, 160)), (k.TEXT, (0, 0))])
def test_packed_segments_equal_separate_questions(model, kind, size):
    """Logits behind a packed prompt are those of the processor's own single prompt: tokens, M-RoPE positions and mask
    agree."""
    processor, stage = build_processor(), replace(TINY, batch=1)
    batch = q.collate(kind, size, range(3, 4), stage)
    segments = q.segments_of(kind, 3, size, stage)
    assert len(segments) >= 3
    kept = []
    hook = model.model.language_model.register_forward_hook(lambda m, a, out: kept.append(out.last_hidden_state))
    with torch.no_grad():
        q.part_loss(model, q.DenseHead(192), batch, stage, amp=False)
    hook.remove()
    packed, row = model.lm_head(kept[0][0, -batch["ids"].shape[1] :]), batch["segment"][0]
    picture = None if kind == k.TEXT else k.image(kind, "train", 3, size)
    for number, (prompt, _) in enumerate(segments, start=1):
        text = " ".join(QWEN_WORDS[i] for i in prompt[:-3])
        content = (
            [{"type": "text", "text": text}] if picture is None else [{"type": "image"}, {"type": "text", "text": text}]
        )
        rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=None if picture is None else [picture], text=[rendered], return_tensors="pt")
        assert inputs["input_ids"][0, -len(prompt) :].tolist() == prompt
        with torch.no_grad():
            alone = model(**inputs).logits[0, -1]
        torch.testing.assert_close(packed[int((row == number).nonzero()[len(prompt) - 1])], alone, atol=3e-4, rtol=3e-4)


def test_a_few_steps_of_every_stage(tmp_path):
    schedule = tuple(replace(stage, steps=1, batch=2) for stage in q.SCHEDULE)
    t.train(tmp_path, width=192, layers=2, seed=0, device="cpu", amp=False, schedule=schedule, family="qwen2_5_vl")
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
    assert (tmp_path / "checkpoint" / "processor_config.json").is_file()


def test_steps_are_a_function_of_their_number():
    first, again = (next(iter(q.MixedPages(TINY, 64)))["parts"] for _ in range(2))
    for part, other in zip(first, again, strict=True):
        assert part["kind"] == other["kind"]
        assert all(torch.equal(part[name], other[name]) for name in part if name not in ("kind", "pages"))


@pytest.mark.parametrize("stage", q.SCHEDULE, ids=lambda stage: stage.name)
def test_every_step_sees_every_kind_by_its_share(stage):
    pages = dict(stage.pages())
    assert sum(pages.values()) == stage.batch
    assert all(abs(pages[kind] - share * stage.batch) <= 1 and pages[kind] > 0 for kind, share in stage.mix)
