from __future__ import annotations

from typing import Any

import torch

from quota.eval.generation import answers, encode, generate, measure_cost, render_prompt
from quota.eval.questions import scene_questions


def test_prompt_is_llava_form(tiny: tuple[Any, Any]) -> None:
    _, processor = tiny
    assert render_prompt(processor, "what is it ?", 1) == "USER: <image>\nwhat is it ? ASSISTANT:"
    assert render_prompt(processor, "what is it ?", 0) == "USER: what is it ? ASSISTANT:"


def test_generate_reports_what_the_cache_holds(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    inputs = encode(model, processor, scene_questions(1, 168))
    made = generate(model, inputs, max_new_tokens=4, min_new_tokens=4)
    prompt = inputs["input_ids"].shape[1]
    assert made.new_ids.shape == (1, 4)
    assert made.cache_tokens == [prompt + 3] * 2
    assert made.cache_bytes == 2 * 2 * (prompt + 3) * 64 * 4  # layers x (k, v) x tokens x heads*dim x float32
    assert made.prefill_ms > 0 and made.decode_ms is not None and made.decode_ms > 0


def test_one_token_has_no_decode_time(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    assert generate(model, encode(model, processor, scene_questions(1, 168)), max_new_tokens=1).decode_ms is None


def test_cost_separates_visual_from_text(tiny: tuple[Any, Any]) -> None:
    cost = measure_cost({"a": (*tiny, None), "b": (*tiny, None)}, scene_questions(2, 168), new_tokens=3)
    assert cost["a"].visual_tokens_by_layer == [16.0, 16.0] == cost["b"].visual_tokens_by_layer
    assert cost["a"].average_visual_tokens == 16.0


def test_pictures_and_text_only_questions(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    questions = scene_questions(3, 168)
    texts = answers(model, processor, questions, 3)
    assert len(texts) == 3 and all(isinstance(t, str) for t in texts)
    blind = encode(model, processor, [q.without_image() for q in questions])
    assert "pixel_values" not in blind and blind["input_ids"].dtype == torch.int64
    assert blind["attention_mask"][:, -1].all(), "padding is on the left"
