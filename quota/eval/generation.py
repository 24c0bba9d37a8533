"""Greedy answers from any supported model, float or quantized, pruned or not, with what each request cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quota.core.errors import SampleError, UsageError
from quota.eval.gpu import GpuCost, measured, together
from quota.eval.questions import Question
from quota.models import find_family
from quota.models.processing import render, reserved_mark, user_turn
from quota.nn.cache import kv_bytes, stored_tokens

if TYPE_CHECKING:
    from quota.core.recipe import Recipe

_MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_sizes",
    "batch_num_images",
    "image_grid_thw",
    "mm_token_type_ids",
    "token_type_ids",
)


def render_prompt(processor: Any, instruction: str, images: int) -> str:
    """A single question as the processor takes it."""
    return render(processor, user_turn(instruction, images))


def check_questions(processor: Any, questions: Sequence[Question]) -> None:
    """SampleError for the first question whose text holds the mark for an image."""
    for q in questions:
        mark = reserved_mark(processor, q.instruction)
        if mark is not None:
            raise SampleError(
                f"sample {q.id!r}: instruction: expected text without {mark}, which stands for an image; name the"
                " image in `image`"
            )


def encode(model: Any, processor: Any, questions: Sequence[Question]) -> dict[str, Tensor]:
    """Left-padded inputs of one batch on the model's device: input_ids, attention_mask [B, T], pixel_values (and what
    the family adds)."""
    check_questions(processor, questions)
    images = [q.open_image() for q in questions if q.open_image is not None]
    return encode_prompts(
        model,
        processor,
        [render_prompt(processor, q.instruction, int(q.open_image is not None)) for q in questions],
        images,
    )


def encode_prompts(model: Any, processor: Any, prompts: list[str], images: list[Any]) -> dict[str, Tensor]:
    """Rendered prompts and their images in order -> left-padded inputs on the model's device."""
    processor.tokenizer.padding_side = "left"
    inputs = processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
    kept = {k: v.to(model.device) for k, v in inputs.items() if k in _MODEL_INPUTS}
    if "pixel_values" in kept:
        kept["pixel_values"] = kept["pixel_values"].to(model.dtype)
    return kept


def room_for_answer(model: Any, prompt_tokens: int) -> int:
    """Tokens left of the model's positions after a prompt, at least 1: the server's rule. UsageError where the prompt
    takes them all."""
    limit = int(model.config.text_config.max_position_embeddings)
    if prompt_tokens >= limit:
        raise UsageError(f"prompt: {prompt_tokens} tokens leave no room for an answer; the limit is {limit} together")
    return limit - prompt_tokens


class _Clock:
    """A stopping criterion that never stops: `generate` calls it once after every new token, which on a GPU it waits
    for."""

    def __init__(self) -> None:
        self.began_s = time.perf_counter()
        self.token_s: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.token_s.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def prefill_ms(self) -> float:
        return 1e3 * (self.token_s[0] - self.began_s)

    @property
    def decode_ms(self) -> float | None:
        """Milliseconds per token after the first; None for a single token."""
        steps = len(self.token_s) - 1
        return 1e3 * (self.token_s[-1] - self.token_s[0]) / steps if steps else None


@dataclass(frozen=True)
class Generated:
    """`new_ids` [B, new] and the cache they left behind. prefill_ms: from `generate` to the first token, image
    encoding included (decoding the image file and resizing it are not); decode_ms: per later token; gpu: what it took
    of a CUDA device."""

    new_ids: Tensor
    prefill_ms: float
    decode_ms: float | None
    cache_tokens: list[int]
    cache_bytes: int
    gpu: GpuCost | None = None


@torch.no_grad()
def generate(
    model: Any, inputs: dict[str, Tensor], *, max_new_tokens: int, min_new_tokens: int = 0, stop: int | None = None
) -> Generated:
    """Greedy decoding of one batch. `stop`: the only token that ends a row; by default those of the model's generation
    config."""
    ends = {} if stop is None else {"eos_token_id": stop, "pad_token_id": stop}
    with measured(inputs["input_ids"].device) as gpu:
        clock = _Clock()
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens or None,
            do_sample=False,
            num_beams=1,
            stopping_criteria=[clock],
            return_dict_in_generate=True,
            **ends,
        )
    cache = out.past_key_values
    return Generated(
        new_ids=out.sequences[:, inputs["input_ids"].shape[1] :],
        prefill_ms=clock.prefill_ms,
        decode_ms=clock.decode_ms,
        cache_tokens=stored_tokens(cache),
        cache_bytes=sum(kv_bytes(cache)),
        gpu=gpu,
    )


def answers(model: Any, processor: Any, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
    """One batch of questions -> texts without special tokens. SampleError names a question whose text holds the mark
    for an image; UsageError for a batch whose longest prompt leaves no room for an answer."""
    inputs = encode(model, processor, questions)
    made = generate(
        model, inputs, max_new_tokens=min(max_new_tokens, room_for_answer(model, inputs["input_ids"].shape[1]))
    )
    return decoded(processor, made)


def decoded(processor: Any, made: Generated) -> list[str]:
    """A text per row, without special tokens and surrounding space."""
    return [text.strip() for text in processor.batch_decode(made.new_ids, skip_special_tokens=True)]


@contextmanager
def under(model: Any, recipe: Recipe | None) -> Iterator[Any]:
    """The model with the recipe installed for a while; None leaves it as it is."""
    from quota.runtime.patch import patched

    if recipe is None:
        yield model
        return
    with patched(model, recipe):
        yield model


@dataclass(frozen=True)
class Cost:
    """Medians and means over single requests of one row; peak memory and average power where a CUDA device ran it."""

    prefill_ms: float
    decode_ms: float
    kv_bytes: float
    visual_tokens_by_layer: list[float]
    prefill_ms_by_request: list[float] = field(default_factory=list)
    decode_ms_by_request: list[float] = field(default_factory=list)
    gpu_peak_bytes: int | None = None
    gpu_power_w: float | None = None
    gpu_power_why_not: str | None = None

    @property
    def average_visual_tokens(self) -> float:
        return sum(self.visual_tokens_by_layer) / len(self.visual_tokens_by_layer)


def measure_cost(
    entries: dict[str, tuple[Any, Any, Recipe | None]],
    questions: Sequence[Question],
    *,
    new_tokens: int = 16,
    progress: Callable[[], Any] | None = None,
) -> dict[str, Cost]:
    """name -> (model, processor, recipe to run it under) timed one request at a time, rows taking turns on each
    question so that drift hits all alike. Rows may share a model.

    Every request makes exactly `new_tokens` tokens; the first question is a warm-up and is not counted. progress:
    called after each request, that is rows x (questions + 1) times.
    """
    seen: dict[str, list[tuple[Generated, list[int]]]] = {name: [] for name in entries}
    for number, question in enumerate([questions[0], *questions]):
        for name, (model, processor, recipe) in entries.items():
            inputs = encode(model, processor, [question])
            with under(model, recipe):
                made = generate(model, inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
            if progress:
                progress()
            if number:
                visual = int(find_family(model).visual(inputs).sum())
                text = inputs["input_ids"].shape[1] - visual
                # the last new token is never run through the model, so it is in no cache
                seen[name].append((made, [n - text - (made.new_ids.shape[1] - 1) for n in made.cache_tokens]))
    return {name: _cost(rows) for name, rows in seen.items()}


def _cost(rows: list[tuple[Generated, list[int]]]) -> Cost:
    count = len(rows)
    used = [made.gpu for made, _ in rows if made.gpu is not None]
    gpu = together(used) if used else None
    return Cost(
        prefill_ms_by_request=[made.prefill_ms for made, _ in rows],
        decode_ms_by_request=[made.decode_ms or float("nan") for made, _ in rows],
        prefill_ms=median(made.prefill_ms for made, _ in rows),
        decode_ms=median(made.decode_ms or float("nan") for made, _ in rows),
        kv_bytes=sum(made.cache_bytes for made, _ in rows) / count,
        visual_tokens_by_layer=[sum(tokens[i] for _, tokens in rows) / count for i in range(len(rows[0][1]))],
        gpu_peak_bytes=gpu.peak_bytes if gpu else None,
        gpu_power_w=gpu.power_w if gpu else None,
        gpu_power_why_not=gpu.power_why_not if gpu else None,
    )
