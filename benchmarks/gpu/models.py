"""Whole 7B models with random weights, made on the device: ours unpruned and with 30 % of the visual tokens,
transformers in bfloat16 beside them.

A request is that of `python -m benchmarks model`: 576 visual and 64 text tokens, answered with 32. A batch is the same
request several times; the serving engine, whose decode steps are CUDA graphs, gets another picture each time, since it
computes equal ones once.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.model.archs import config_of
from benchmarks.model.measure import NEW_TOKENS, answer, float_model, recipe_for, request
from benchmarks.model.synthetic import FLOAT, make_model
from quota.eval.gpu import measured
from quota.nn.cache import kv_bytes
from quota.nn.float_attention import why_not_flash
from quota.runtime.patch import patched

ARCHS = ("llava-1.5-7b", "qwen2.5-vl-7b")
KEEP = 0.3


@dataclass(frozen=True)
class Sizes:
    """layers None: all. batches: requests answered together. repeats: timed ones, after one that is not."""

    device: str = "cuda"
    layers: int | None = None
    batches: tuple[int, ...] = (1, 16)
    repeats: int = 3


def rows(arch: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """One row per implementation and batch; one that cannot run gives a row that says why, and the others go on."""
    for name, keep in (("quota", None), (f"quota, keep {KEEP:g}", KEEP)):
        yield from _measured(arch, name, lambda: make_model(config_of(arch, sizes.layers), sizes.device), sizes, keep)
    yield from _served(arch, sizes)
    attention = "flash_attention_2" if why_not_flash(torch.device(sizes.device), FLOAT) is None else "sdpa"
    yield from _measured(
        arch,
        f"transformers bf16, {attention}",
        lambda: float_model(config_of(arch, sizes.layers), FLOAT, sizes.device, attention),
        sizes,
        None,
    )


def _measured(
    arch: str, name: str, make: Callable[[], Any], sizes: Sizes, keep: float | None
) -> Iterator[dict[str, Any]]:
    try:
        model = make()
        if keep is not None:
            patched(model, recipe_for(model, keep))
    except Exception as error:
        yield {"case": arch, "implementation": name, "failed": _said(error)}
        return
    for batch in sizes.batches:
        row = {"case": f"{arch} B={batch}", "implementation": name}
        try:
            yield row | _answers(model, batch, sizes)
        except Exception as error:
            yield row | {"failed": _said(error)}
    del model
    _free(sizes)


def _free(sizes: Sizes) -> None:
    gc.collect()
    if sizes.device != "cpu":
        torch.cuda.empty_cache()


def _answers(model: Any, batch: int, sizes: Sizes) -> dict[str, Any]:
    inputs = {name: _repeated(name, tensor, batch).to(sizes.device) for name, tensor in request(model).items()}
    cache = answer(model, inputs)[1]
    held, tokens = sum(kv_bytes(cache)), [int(layer.get_seq_length()) for layer in cache.layers]
    del cache
    with measured(torch.device(sizes.device)) as cost:
        spent = [answer(model, inputs)[0] for _ in range(sizes.repeats)]
    return _row(batch, spent, cost) | {"kv_bytes": held, "cache_tokens": sum(tokens) / len(tokens)}


def _row(batch: int, spent: list[dict[str, float]], cost: Any) -> dict[str, Any]:
    ttft_ms, decode_ms = (median(s[name] for s in spent) for name in ("ttft_ms", "decode_ms"))
    found = {
        "ttft_ms": round(ttft_ms, 3),
        "decode_ms": round(decode_ms, 3),
        "tokens_per_s": round(1e3 * batch / decode_ms, 1),
        "new_tokens": NEW_TOKENS,
    }
    return (
        found
        if cost is None
        else found | {"peak_bytes": cost.peak_bytes, "power_w": cost.power_w, "power_why_not": cost.power_why_not}
    )


def _served(arch: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """The serving engine's rows, unpruned and pruned."""
    names = {None: "quota, engine", "q": f"quota, engine, keep {KEEP:g}"}
    try:
        engine, prompt = _engine(arch, sizes)
    except Exception as error:
        yield {"case": arch, "implementation": names[None], "failed": _said(error)}
        return
    for recipe, name in names.items():
        for batch in sizes.batches:
            row = {"case": f"{arch} B={batch}", "implementation": name}
            try:
                held = _batch(engine, [prompt() for _ in range(batch)], recipe)["kv_bytes"]
                with measured(torch.device(sizes.device)) as cost:
                    spent = [_batch(engine, [prompt() for _ in range(batch)], recipe) for _ in range(sizes.repeats)]
                yield row | _row(batch, spent, cost) | {"kv_bytes": int(held)}
            except Exception as error:
                yield row | {"failed": _said(error)}
    del engine, prompt
    _free(sizes)


def _engine(arch: str, sizes: Sizes) -> tuple[Any, Callable[[], Any]]:
    """An engine with room for the largest batch, and what makes a prompt with a picture of its own."""
    from quota.core.formats import KV4
    from quota.runtime.engine import Engine, EngineConfig, Prompt
    from quota.runtime.engine.kv_storage import block_bytes

    model = make_model(config_of(arch, sizes.layers), sizes.device)
    inputs, generator, page_tokens = request(model), torch.Generator().manual_seed(1), EngineConfig.page_tokens
    text, ids = model.config.text_config, inputs["input_ids"][0].tolist()
    pages = max(sizes.batches) * text.num_hidden_layers * -(-(len(ids) + NEW_TOKENS) // page_tokens)
    config = EngineConfig(
        kv_bytes=pages
        * block_bytes(page_tokens, text.num_key_value_heads, text.hidden_size // text.num_attention_heads, KV4),
        prefix_cache=False,
        feature_bytes=0,
        step_tokens=max(sizes.batches) * len(ids),  # all prompts in one step, as `generate` takes them
    )
    engine = Engine(model, recipes={"q": recipe_for(model, KEEP)}, config=config)

    def prompt() -> Prompt:
        pixels = torch.randn(inputs["pixel_values"].shape, generator=generator)
        return Prompt(ids, engine.model.images({**inputs, "pixel_values": pixels}))

    return engine, prompt


def _batch(engine: Any, prompts: list[Any], recipe: str | None) -> dict[str, float]:
    """Answer these together -> milliseconds until the last of them has its first token and per later token, and the
    most bytes of keys and values held."""
    from quota.runtime.engine import Request, SamplingParams

    began, first, blocks = time.perf_counter(), dict[str, float](), 0
    engine.submit_all(
        [
            Request(str(n), prompt, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True), recipe)
            for n, prompt in enumerate(prompts)
        ]
    )
    while engine.busy:
        outputs, now = engine.step(), time.perf_counter()
        blocks = max(blocks, engine.pool.blocks - engine.pool.available)
        for output in outputs:
            if output.reason == "error":
                raise RuntimeError(output.error)
            first.setdefault(output.id, now)
    answered = max(first.values())
    decode_ms = 1e3 * (now - answered) / (NEW_TOKENS - 1)
    return {
        "ttft_ms": 1e3 * (answered - began),
        "decode_ms": decode_ms,
        "kv_bytes": blocks * engine.storage.block_bytes,
    }


def _repeated(name: str, tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """Rows of a batch lie along the first dimension of every input; patches and grids of pictures too, one after the
    other."""
    return tensor.repeat(batch, *[1] * (tensor.ndim - 1))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def failures(found: list[dict[str, Any]]) -> list[str]:
    """What of ours did not run; a peer that did not is in its row alone."""
    return [
        f"{r['case']}, {r['implementation']}: {r['failed']}"
        for r in found
        if "failed" in r and r["implementation"].startswith("quota")
    ]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| case | implementation | TTFT ms | tokens/s | KV cache MB | peak GiB | average W |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for r in found:
        if "failed" in r:
            lines.append(f"| {r['case']} | {r['implementation']} | {r['failed']} | | | | |")
            continue
        peak = f"{r['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in r else ""
        power = format(r["power_w"], ".0f") if r.get("power_w") is not None else r.get("power_why_not") or ""
        lines.append(
            f"| {r['case']} | {r['implementation']} | {r['ttft_ms']:.1f} | {r['tokens_per_s']:.1f} |"
            f" {r['kv_bytes'] / 1e6:.1f} | {peak} | {power} |"
        )
    return "\n".join(lines)
