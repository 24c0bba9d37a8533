"""A whole model: the quantized one with and without pruning, and transformers' float model, each in a process of its
own.

Every process prints one JSON document. A request is a picture of 576 visual tokens with 64 text tokens, answered with
32 tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine, rows
from quota.core.errors import QuotaError
from quota.core.formats import DEFAULT

OP = "model"
TEXT_TOKENS, NEW_TOKENS = 64, 32
_LEADING_TEXT = 16  # of the text tokens, how many stand before the picture
_REQUESTS = 3
_FLOAT_SHARE = 0.55  # of the memory that is free, how much float weights may take


@dataclass(frozen=True)
class Job:
    """One process. keep None: unpruned. float_dtype: transformers' own model, no checkpoint. layers None: all."""

    arch: str
    checkpoint: str | None = None
    keep: float | None = None
    float_dtype: str | None = None
    layers: int | None = None
    threads: int = 1
    requests: int = _REQUESTS

    @property
    def name(self) -> str:
        if self.float_dtype:
            return f"transformers {self.float_dtype}"
        return "quota" if self.keep is None else f"quota, keep {self.keep:g}"


def measure(job: Job) -> dict[str, Any]:
    """Run a job in a fresh process and return what it measured. QuotaError with the last line it said when it
    failed."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.model.measure", json.dumps(asdict(job))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(job.threads)},
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise QuotaError(
            f"{job.name}: its process ended with status {done.returncode}:"
            f" {said[-1] if said else 'killed, perhaps for memory'}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(job: Job, found: dict[str, Any], checkpoint_bytes: int | None) -> dict[str, Any]:
    """The row of results of a finished job."""
    return {
        **rows.stamp(job.threads),
        "op": OP,
        "shape": job.arch,
        "size": {"visual": found["visual_tokens"], "text": TEXT_TOKENS, "new": NEW_TOKENS},
        "weights": "resident",
        "implementation": job.name,
        "ours": job.float_dtype is None,
        "checkpoint_bytes": checkpoint_bytes,
        **found,
    }


def float_layers(arch: str, dtype: str) -> int:
    """How many decoder layers of the float model fit in the free memory."""
    from benchmarks.model.archs import config_of
    from quota.models import find_family

    config, size = config_of(arch), 4 if dtype == "float32" else 2
    sizes = find_family(config)
    layer = (
        size
        * sizes.hidden_size
        * (2 * sizes.hidden_size + 2 * sizes.kv_heads * sizes.head_dim + 3 * sizes.intermediate_size)
    )
    fixed = size * (2 * config.text_config.vocab_size * sizes.hidden_size) + 2 * 10**9
    return max(2, min(sizes.layers, int((_FLOAT_SHARE * machine.free_bytes() - fixed) / layer)))


# -- inside the process
# ------------------------------------------------------------------------------------------------------


def recipe_for(model: Any, keep: float) -> Any:
    """Equal drops at layers 2 to 8, where LLaVA-1.5-7B is published to prune, down to `keep`."""
    from benchmarks.model.archs import VISUAL_TOKENS
    from quota.core.recipe import ModelFacts, Recipe
    from quota.models import find_family, model_fingerprint

    layers = model.config.text_config.num_hidden_layers
    candidates = tuple(range(2, min(9, layers)))
    ratios = [round(1 - (1 - keep) * (i + 1) / len(candidates), 6) for i in range(len(candidates) - 1)] + [keep]
    facts = ModelFacts(
        architecture=find_family(model).model_class,
        fingerprint=model_fingerprint(model),
        layers=layers,
        visual_tokens=VISUAL_TOKENS,
    )
    return Recipe(
        method="uniform",
        regime=DEFAULT.name,
        model=facts,
        candidates=candidates,
        keep=tuple(ratios),
        final_keep=keep,
        reference_tokens=VISUAL_TOKENS,
    )


def request(model: Any) -> dict[str, Any]:
    """Random pixels and token ids: text, picture, text. Where resolution is dynamic, the picture is a square of as many
    tokens."""
    import torch

    from benchmarks.model.archs import VISUAL_TOKENS
    from quota.models import find_family

    family, generator = find_family(model), torch.Generator().manual_seed(0)
    text = torch.randint(3, min(30000, family.image_token_id), (1, TEXT_TOKENS), generator=generator)
    image = torch.full((1, VISUAL_TOKENS), family.image_token_id)
    ids = torch.cat([text[:, :_LEADING_TEXT], image, text[:, _LEADING_TEXT:]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shape, grid = family.pixel_shape(VISUAL_TOKENS)
    if grid is not None:
        inputs |= {"image_grid_thw": torch.tensor([grid]), "mm_token_type_ids": (ids == family.image_token_id).int()}
    pixels = torch.randn(shape if grid is not None else (1, *shape), generator=generator)
    return inputs | {"pixel_values": pixels.to(model.dtype)}


def float_model(config: Any, dtype: Any, device: str = "cpu", attention: str = "sdpa") -> Any:
    """transformers' model of `config` on `device`, `attention` as transformers names it; every layer holds the same
    random numbers, in memory of its own."""
    import torch
    import transformers

    from quota.models import find_family, submodule

    family = find_family(config)
    with torch.device("meta"):
        model: Any = getattr(transformers, family.model_class)._from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    model = model.to_empty(device=device)
    first: dict[Any, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kind = ".".join(part for part in name.split(".") if not part.isdigit()), tensor.shape
        if tensor.dtype == torch.int64:
            tensor.copy_(torch.arange(tensor.shape[-1]).expand(tensor.shape))
        elif kind in first:
            tensor.data.copy_(first[kind])
        else:
            first[kind] = tensor.data.fill_(1) if tensor.ndim == 1 else tensor.data.normal_(0, 0.02)
    text, tower = model.model.language_model, submodule(model, family.vision_path)
    text.rotary_emb = type(text.rotary_emb)(config=config.text_config)
    if hasattr(tower, "rotary_pos_emb"):
        tower.rotary_pos_emb = type(tower.rotary_pos_emb)(tower.config)  # type: ignore[operator]
    return model.to(device).eval().requires_grad_(False)


class _Clock:
    """A stopping criterion that never stops: `generate` calls it once after every new token, which on a GPU it waits
    for."""

    def __init__(self) -> None:
        self.wall_s, self.cpu_s = [time.perf_counter()], [time.process_time()]

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.wall_s.append(time.perf_counter())
        self.cpu_s.append(time.process_time())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def answer(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, float], Any]:
    """One request -> (milliseconds to the first token and per later token, wall and CPU time; its cache)."""
    clock = _Clock()
    out = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        stopping_criteria=[clock],
        return_dict_in_generate=True,
    )
    spent = {}
    for name, at in (("", clock.wall_s), ("cpu_", clock.cpu_s)):
        spent[f"ttft_{name}ms"] = 1e3 * (at[1] - at[0])
        spent[f"decode_{name}ms"] = 1e3 * (at[-1] - at[1]) / (NEW_TOKENS - 1)
    return spent, out.past_key_values


def run_job(job: Job) -> dict[str, Any]:
    """Load or make the model, answer one request to warm up and `requests` to measure."""
    import torch

    from benchmarks.model.archs import config_of
    from quota.core.malloc import keep_freed_memory
    from quota.nn.cache import kv_bytes
    from quota.runtime.load import load

    torch.set_num_threads(job.threads)
    keep_freed_memory()  # as `load` does: the float model gets it too
    began = time.perf_counter()
    if job.checkpoint:
        model = load(job.checkpoint, dtype=torch.bfloat16, verify=False)
    else:
        model = float_model(config_of(job.arch, job.layers), getattr(torch, job.float_dtype or "float32"))
    if job.keep is not None:
        from quota.runtime.patch import patched

        patched(model, recipe_for(model, job.keep))
    load_s, inputs = time.perf_counter() - began, request(model)
    first, cache = answer(model, inputs)
    made = [answer(model, inputs)[0] for _ in range(job.requests)]
    held, tokens = kv_bytes(cache), [int(layer.get_seq_length()) for layer in cache.layers]
    return {
        "layers": model.config.text_config.num_hidden_layers,
        "visual_tokens": int((inputs["input_ids"] == model.config.image_token_id).sum()),
        "load_s": round(load_s, 2),
        "first_ttft_ms": round(first["ttft_ms"], 1),
        "requests": job.requests,
        **{name: round(median(spent[name] for spent in made), 3) for name in first},
        "kv_bytes": sum(held),
        "kv_bytes_per_layer": round(sum(held) / len(held)),
        "cache_tokens": tokens,
        **machine.memory(),
    }


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of every file of a checkpoint folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


if __name__ == "__main__":
    print(json.dumps(run_job(Job(**json.loads(sys.argv[1])))))
