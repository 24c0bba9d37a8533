"""Measures the layers: float model beside its quantized counterpart, one sample at a time.

Per decoder layer: attention concentration and redundancy on the float model (where to prune), and the relative error of
the layer's input in the quantized model (how sensitive it is), both models running unpruned on the same prompts.
Memory: one sample's layer inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from quota.allocate.compute import decoder_sizes
from quota.allocate.profile import Profile
from quota.allocate.sensitivity import percentile, relative_error, sensitivity
from quota.calib.samples import Samples, check_texts, encode
from quota.core.errors import CheckpointError, SampleError
from quota.core.recipe import ModelFacts
from quota.core.version import VERSION
from quota.models import find_family, model_fingerprint, submodule, vision_macs
from quota.models.quantize import model_scheme

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


def text_to_visual(attention: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], visual: Tensor) -> Tensor | None:
    """Attention of the text after the image to each visual token, from the layer's own projections.

    attention: a float LLaMA attention module; hidden [1, S, d]: its input; rope: (cos, sin) [1, S, D]; visual [S] bool.
    Returns [V] float64, the mean over heads and text queries of the causal softmax's visual columns; None without text
    after the image.
    """
    places = visual.nonzero()[:, 0]
    rows = torch.arange(int(places[-1]) + 1, hidden.shape[1], device=hidden.device)
    if rows.numel() == 0:
        return None
    size = attention.head_dim
    q = attention.q_proj(hidden[:, rows])[0].double().unflatten(-1, (-1, size)).transpose(0, 1)  # [H, R, D]
    k = attention.k_proj(hidden)[0].double().unflatten(-1, (-1, size)).transpose(0, 1)  # [Hkv, S, D]
    cos, sin = (t[0].double() for t in rope)
    q, k = _rotate(q, cos[rows], sin[rows]), _rotate(k, cos, sin)
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    scores = q @ k.transpose(1, 2) * attention.scaling
    later = torch.arange(hidden.shape[1], device=hidden.device)[None, :] > rows[:, None]
    return scores.masked_fill(later, float("-inf")).softmax(-1)[..., places].mean((0, 1))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def profile(
    float_model: nn.Module,
    quant_model: nn.Module,
    processor: Any,
    samples: Samples,
    progress: bool | Callable[[int, int], None] = False,
) -> Profile:
    """Profile a float model and the quantized model made from it over `samples`.

    progress: True shows a bar, a callable is called with (done, total) after each sample. Deterministic: sums in
    float64, medians over samples, figures rounded to 6 significant digits. Both models run in evaluation mode; hooks
    are removed whatever happens. CheckpointError when the two are not the same model; SampleError when no sample has a
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
    try:
        with _one_thread(), _progress(progress) as tell, torch.inference_mode():
            for done, sample in enumerate(samples, start=1):
                figures.add(float_model, quant_model, encode(processor, sample))
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


class _Figures:
    """Numbers collected over samples, per layer."""

    def __init__(self, layers: int) -> None:
        self.spread: list[list[float]] = [[] for _ in range(layers)]
        self.alike: list[list[float]] = [[] for _ in range(layers)]
        self.errors: list[list[float]] = [[] for _ in range(layers)]
        self.visual_tokens: list[int] = []
        self.text_tokens: list[int] = []

    def add(self, float_model: nn.Module, quant_model: nn.Module, inputs: Any) -> None:
        """Run both models on one sample."""
        visual = inputs["input_ids"][0] == find_family(float_model).image_token_id
        pictured = bool(visual.any())
        exact = _run(float_model, _layers(float_model), inputs, _Watch(visual, self.spread) if pictured else None)
        deployed = _run(quant_model, _layers(quant_model), inputs, None)
        self.text_tokens.append(int((~visual).sum()))
        if pictured:
            self.visual_tokens.append(int(visual.sum()))
        for i, (x, x_q) in enumerate(zip(exact, deployed, strict=True)):
            x = x.double()
            self.errors[i].append(relative_error(float((x - x_q.double()).norm()), float(x.norm())))
            if pictured:
                self.alike[i].append(redundancy(x[0, visual]))


class _Watch:
    """Appends each layer's concentration for one sample."""

    def __init__(self, visual: Tensor, spread: list[list[float]]) -> None:
        self.visual, self.spread = visual, spread

    def hook(self, index: int) -> Callable[..., None]:
        def measure(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            attention = text_to_visual(module, hidden, kwargs["position_embeddings"], self.visual)
            if attention is not None:
                self.spread[index].append(concentration(attention))

        return measure


def _run(model: nn.Module, layers: list[nn.Module], inputs: Any, watch: _Watch | None) -> list[Tensor]:
    """The hidden states [1, S, d] at each decoder layer's input."""
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hooks: list[tuple[nn.Module, Callable[..., None]]] = [(layer, record) for layer in layers]
    if watch is not None:
        hooks += [(layer.get_submodule("self_attn"), watch.hook(i)) for i, layer in enumerate(layers)]
    with _hooked(hooks):
        model(**inputs, use_cache=False, logits_to_keep=1)
    return seen


@contextmanager
def _hooked(hooks: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Float matrix products sum in an order that depends on the number of threads, and the recipe's bytes must not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _progress(show: bool | Callable[[int, int], None]) -> Iterator[Callable[[int, int], None]]:
    """The callback itself, a bar on stderr for True, nothing for False."""
    if callable(show):
        yield show
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("profiling layers"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("profile", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _layers(model: nn.Module) -> list[nn.Module]:
    return list(submodule(model, find_family(model).decoder_path).children())


def model_facts(model: Any, fingerprint: str, visual_tokens: list[int], text_tokens: list[int]) -> ModelFacts:
    """What recipes and the cost model need: sizes, and medians of the tokens per prompt."""
    sizes = decoder_sizes(model.config)
    text = model.config.text_config
    return ModelFacts(
        architecture=type(model).__name__,
        fingerprint=fingerprint,
        layers=sizes.layers,
        visual_tokens=round(median(visual_tokens)),
        hidden_size=sizes.hidden_size,
        kv_size=sizes.kv_size,
        intermediate_size=sizes.intermediate_size,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        text_tokens=max(1, round(median(text_tokens))),
        vision_macs=vision_macs(model.config, round(median(visual_tokens))),
    )
