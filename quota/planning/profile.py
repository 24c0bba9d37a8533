"""Measures the layers: float model beside its quantized counterpart, one sample at a time.

Per decoder layer: attention concentration and redundancy on the float model (where to prune), and the relative error of
the layer's input in the quantized model (how sensitive it is), both models running unpruned on the same prompts.
Memory: the layer inputs of one sample per thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from quota.allocate.profile import Profile
from quota.allocate.sensitivity import percentile, relative_error, sensitivity
from quota.calib.samples import Sample, Samples, check_texts
from quota.core.errors import CheckpointError, SampleError
from quota.core.threads import one_thread
from quota.core.version import VERSION
from quota.models import find_family, model_fingerprint, submodule
from quota.models.copies import copies_of, is_small
from quota.models.quantize import model_scheme
from quota.nn.attention import AttentionTrace
from quota.planning.facts import inputs_of, model_facts
from quota.planning.progress import Tell, shown
from quota.prune.attention import mean_attention, text_queries
from quota.prune.recording import attending

Opened: TypeAlias = tuple[Any, Any, Any]  # float model, quantized model, processor
TOP = 10  # attention concentration: mass of the 10 largest shares


def concentration(attention: Tensor, top: int = TOP) -> float:
    """Mass of the `top` largest entries of `attention` [V] (non-negative) after renormalising it to sum 1; 1.0 when V
    <= top."""
    shares = attention.double() / attention.double().sum().clamp_min(1e-30)
    return float(shares.topk(min(top, shares.numel())).values.sum())


def redundancy(hidden: Tensor) -> float:
    """Median pairwise cosine similarity of the rows of `hidden` [V, d], pairs i < j; 1.0 for a single row."""
    n = hidden.shape[0]
    if n < 2:
        return 1.0
    unit = nn.functional.normalize(hidden.double(), dim=-1)
    above = torch.ones(n, n, dtype=torch.bool, device=hidden.device).triu(1)
    return float((unit @ unit.T)[above].median())


def profile(
    float_model: nn.Module,
    quant_model: nn.Module,
    processor: Any,
    samples: Samples,
    progress: bool | Tell = False,
) -> Profile:
    """Profile a float model and the quantized model made from it over `samples`.

    progress: True shows a bar, a callable is called with (done, total) after each sample. Deterministic: sums in
    float64, medians over samples, figures rounded to 6 significant digits. Both models run in evaluation mode; hooks
    are removed whatever happens. Both are on one device, whichever; figures of another device than the CPU differ from
    the CPU's as its sums do. CheckpointError when the two are not the same model; SampleError when no sample has a
    image followed by text.
    """
    fingerprint = model_fingerprint(float_model)
    if model_fingerprint(quant_model) != fingerprint:
        raise CheckpointError(
            f"model: the quantized checkpoint was made from {model_fingerprint(quant_model)}, the float model given is"
            f" {fingerprint}; give the model it was calibrated from"
        )
    check_texts(processor, samples)
    figures = _Figures(len(_layers(float_model)))
    was_training = float_model.training, quant_model.training
    float_model.eval(), quant_model.eval()
    opened = float_model, quant_model, processor
    try:
        with one_thread() as threads, shown(progress, "profiling layers") as tell:
            for done, measured in enumerate(_side_by_side(opened, samples, threads), start=1):
                figures.add(measured)
                tell(done, len(samples))
    finally:
        float_model.train(was_training[0]), quant_model.train(was_training[1])
    if not all(figures.spread):
        raise SampleError(
            "samples: expected at least one with an image followed by text, got none; layers are chosen by attention"
            " to images"
        )
    return Profile(
        model=model_facts(float_model, fingerprint, figures.visual_tokens, figures.text_tokens),
        regime=model_scheme(quant_model).name,
        samples=len(samples),
        calibration_fingerprint=samples.fingerprint,
        tool_version=VERSION,
        concentration_median=tuple(median(v) for v in figures.spread),
        concentration_q25=tuple(percentile(v, 25) for v in figures.spread),
        concentration_q75=tuple(percentile(v, 75) for v in figures.spread),
        redundancy_median=tuple(median(v) for v in figures.alike),
        sensitivity=tuple(sensitivity(v) for v in figures.errors),
    )


@dataclass(frozen=True)
class _Measured:
    """Figures of one sample: tokens, and per layer concentration (where text follows an image), redundancy (where there
    is one) and error."""

    visual_tokens: int
    text_tokens: int
    spread: list[float]
    alike: list[float]
    errors: list[float]


class _Figures:
    """Numbers collected over samples, per layer."""

    def __init__(self, layers: int) -> None:
        self.spread: list[list[float]] = [[] for _ in range(layers)]
        self.alike: list[list[float]] = [[] for _ in range(layers)]
        self.errors: list[list[float]] = [[] for _ in range(layers)]
        self.visual_tokens: list[int] = []
        self.text_tokens: list[int] = []

    def add(self, sample: _Measured) -> None:
        self.text_tokens.append(sample.text_tokens)
        if sample.visual_tokens:
            self.visual_tokens.append(sample.visual_tokens)
        for name in ("spread", "alike", "errors"):
            found = getattr(sample, name)  # of every layer, or empty
            for collected, figure in zip(getattr(self, name), found, strict=False):
                collected.append(figure)


def _side_by_side(opened: Opened, samples: Samples, threads: int) -> Iterator[_Measured]:
    """All samples in their order, small models measuring one in each of `threads` threads."""
    free = SimpleQueue[Opened]()
    count = min(threads, len(samples)) if all(map(is_small, opened[:2])) else 1
    for own in copies_of(opened, count):
        free.put(own)

    def measured(sample: Sample) -> _Measured:
        own = free.get()
        try:
            return _measured(own, sample)
        finally:
            free.put(own)

    if count == 1:
        yield from map(measured, samples)
        return
    with ThreadPoolExecutor(count) as pool:
        yield from pool.map(measured, samples)


@torch.inference_mode()
def _measured(opened: Opened, sample: Sample) -> _Measured:
    """Run both models on one sample."""
    float_model, quant_model, processor = opened
    inputs = inputs_of(float_model, processor, sample)
    family = find_family(float_model)
    visual, shown = family.visual(inputs), inputs["input_ids"] == family.image_token_id
    pictured = bool(visual.any())
    text = text_queries(shown, torch.ones_like(shown))
    spread = list[float]()

    def concentrated(layer: int, trace: AttentionTrace) -> None:
        spread.append(concentration(mean_attention(trace, visual, text)[visual]))

    followed = pictured and not bool((text & shown).any())  # there is text after the image
    with attending(float_model, concentrated) if followed else nullcontext():
        exact = _layer_inputs(float_model, inputs)
    deployed = _layer_inputs(quant_model, inputs)
    errors, alike = list[float](), list[float]()
    for x, x_q in zip(exact, deployed, strict=True):
        x = x.double()
        errors.append(relative_error(float((x - x_q.double()).norm()), float(x.norm())))
        if pictured:
            alike.append(redundancy(x[0, visual[0]]))
    return _Measured(int(visual.sum()), int((~visual).sum()), spread, alike, errors)


def _layer_inputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The hidden states [1, S, d] at each decoder layer's input."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack:
        for layer in _layers(model):
            stack.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
        model(**inputs, use_cache=False, logits_to_keep=1)
    return seen


def _layers(model: nn.Module) -> list[nn.Module]:
    return list(submodule(model, find_family(model).decoder_path).children())
