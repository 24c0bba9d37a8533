"""The serving engine on the device, beside itself on the CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.options import Line, Options, facts, failure

_ANSWER_TOKENS, _TIMED_TOKENS = 12, 64
_BATCHES = (1, 16)


def serving(options: Options) -> Iterator[Line]:
    """The engine's greedy answers on the device are the CPU's, with CUDA graphs and without; tokens per second of its
    decode steps."""
    from quota.runtime.engine import EngineConfig

    if options.dry:
        plan = [
            f"{_BATCHES[-1]} questions on CPU and GPU",
            *(f"decode at {n} requests, graphs {on}" for n in _BATCHES for on in ("on", "off")),
        ]
        yield facts(cpu_answers=_answers("cpu", EngineConfig(), 2, 2), would_run=plan)
        return
    want = _answers("cpu", EngineConfig(), _BATCHES[-1], _ANSWER_TOKENS)
    yield facts(questions=len(want))
    for graphs in (True, False):
        config = EngineConfig(
            graphs=graphs, step_tokens=1 << 14
        )  # all prompts in one step, so that all answers grow together
        got = _answers("cuda", config, len(want), _ANSWER_TOKENS)
        yield from (
            failure(f"{name}, graphs {graphs}: CPU {want[name]}, GPU {got[name]}")
            for name in want
            if got[name] != want[name]
        )
        for n in _BATCHES:
            yield {"row": {"requests": n, "graphs": graphs, "tokens_per_s": _speed(config, n)}}


def _engine(device: str, config: Any) -> tuple[Any, list[Any]]:
    """The embedded model, rounded to 4 bits, and its questions as prompts."""
    from quota.core import images
    from quota.models.rtn import quantize_rtn
    from quota.runtime.engine import Engine, Prompt
    from quota.runtime.load import load
    from quota.scenes import assets

    loaded = load(assets.CHECKPOINT)
    engine = Engine(quantize_rtn(loaded).eval().to(device), config=config)
    prompts = []
    for sample in json.loads((assets.SAMPLES.parent / "samples.json").read_text())["samples"][: _BATCHES[-1]]:
        picture = images.open_file(assets.SAMPLES.parent / sample["image"])
        inputs = loaded.processor(
            images=[picture], text=f"USER: <image>\n{sample['instruction']} ASSISTANT:", return_tensors="pt"
        )
        prompts.append(Prompt(inputs["input_ids"][0].tolist(), engine.model.images(inputs)))
    return engine, prompts


def _submit(engine: Any, prompts: list[Any], tokens: int) -> None:
    from quota.runtime.engine import Request, SamplingParams

    engine.submit_all(
        [
            Request(str(i), prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))
            for i, prompt in enumerate(prompts)
        ]
    )


def _answers(device: str, config: Any, questions: int, tokens: int) -> dict[str, list[int]]:
    engine, prompts = _engine(device, config)
    _submit(engine, prompts[:questions], tokens)
    answers: dict[str, list[int]] = {}
    while engine.busy:
        for output in engine.step():
            answers.setdefault(output.id, []).extend(output.tokens)
    return answers


def _speed(config: Any, requests: int) -> float:
    """Tokens per second over the second half of the answers, where every graph is captured."""
    engine, prompts = _engine("cuda", config)
    for _ in range(2):
        _submit(engine, prompts[:requests], _TIMED_TOKENS)
        while (
            not all(len(s.answer) >= _TIMED_TOKENS // 2 for s in engine.scheduler.running)
            or len(engine.scheduler.running) < requests
        ):
            engine.step()
        began, before = time.perf_counter(), engine.stats.tokens
        while engine.busy:
            engine.step()
        speed = (engine.stats.tokens - before) / (time.perf_counter() - began)
    return float(speed)
