"""Fuzzing by command: the request parser, the picture decoder, the settings and the recipe loader, for as long as asked.

    python -m benchmarks.serve.fuzz --seconds 600 --seed 1
    python -m benchmarks.serve.fuzz --seconds 600 --guided        (needs the package atheris: inputs are chosen by code coverage)

Each must either accept its input or refuse it with its own error; anything else is printed with the input that did it, and the status is 1.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.serve.traffic import picture_bytes
from quota.core.errors import RecipeError
from quota.core.images import Limits, decode
from quota.core.recipe import Recipe
from quota.server.errors import ApiError, as_api_error
from quota.server.schemas import ChatRequest, CompletionRequest

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**63, -(2**70), 0.5, 1e308, float("inf"), "", "user", "x" * 1000, "\ud800", "\x00", [], {}, [[]], [None], {"type": "text"},
)  # fmt: skip
PICTURE = {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}
CHAT = {
    "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, PICTURE]}],
    "max_tokens": 3, "temperature": 0.5, "top_p": 0.5, "n": 1, "seed": 3, "stop": ["a"], "stream": False, "logprobs": True, "top_logprobs": 2, "keep": 0.5,
}  # fmt: skip
COMPLETION = {"model": "m", "prompt": ["x"], "max_tokens": 3, "logprobs": 1, "n": 2}
RECIPE = {
    "method": "quota", "regime": "w4a4kv4", "model": {"architecture": "x", "fingerprint": "sha256:" + "0" * 64, "layers": 8, "visual_tokens": 144},
    "candidates": [2, 3], "keep": [0.5, 0.3], "final_keep": 0.3, "reference_tokens": 144, "sensitivities": [0.1, 0.2], "weights": {"inter": 0.5, "quant": 0.0},
}  # fmt: skip


def mutate(value: Any, rng: random.Random) -> Any:
    """One random change somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.1:
            del changed[key]
        elif rng.random() < 0.1:
            changed[rng.choice(("", "role", "nonsense", "\ud800"))] = rng.choice(VALUES)
        else:
            changed[key] = mutate(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], mutate(value[at], rng), *value[at + (rng.random() < 0.8) :]]
    return rng.choice(VALUES)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut or doubled."""
    broken = bytearray(data)
    for _ in range(rng.randint(0, 6)):
        if broken:
            broken[rng.randrange(len(broken))] = rng.randrange(256)
    if rng.random() < 0.3:
        del broken[rng.randint(0, len(broken)) :]
    return bytes(broken * (2 if rng.random() < 0.05 else 1))


def body(base: dict[str, Any], rng: random.Random) -> bytes:
    value: Any = base
    for _ in range(rng.randint(1, 4)):
        value = mutate(value, rng)
    text = json.dumps(value).encode()
    return damaged(text, rng) if rng.random() < 0.3 else text


def chat(rng: random.Random) -> bytes:
    data = body(CHAT, rng)
    _refused(lambda: ChatRequest.model_validate_json(data).samplings())
    return data


def completion(rng: random.Random) -> bytes:
    data = body(COMPLETION, rng)
    _refused(lambda: CompletionRequest.model_validate_json(data).samplings())
    return data


def picture(rng: random.Random) -> bytes:
    data = damaged(picture_bytes(rng, (64, 64)), rng)
    _refused(lambda: decode(data, Limits(pixels=1_000_000)))
    return data


def recipe(rng: random.Random) -> bytes:
    value: Any = RECIPE
    for _ in range(rng.randint(1, 4)):
        value = mutate(value, rng)
    try:
        parsed = Recipe.parse(value if isinstance(value, dict) else {"value": value})
        assert Recipe.parse(json.loads(parsed.dumps())) == parsed, "a recipe that does not survive its own text"
    except RecipeError:
        pass
    return repr(value).encode()


def _parse_recipe(data: bytes) -> None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict):
        Recipe.parse(value)


def _refused(function: Callable[[], Any]) -> None:
    """Run; an exception has to become a 4xx."""
    try:
        function()
    except Exception as error:
        answer: ApiError = as_api_error(error)
        if not 400 <= answer.status < 500:
            raise
        json.dumps(answer.body, ensure_ascii=False)


TARGETS: tuple[Callable[[random.Random], bytes], ...] = (chat, completion, picture, recipe)


def fuzz(seconds: float, seed: int) -> tuple[int, list[str]]:
    """(inputs tried, descriptions of the failures)."""
    until, tried, failures = time.monotonic() + seconds, 0, []
    while time.monotonic() < until and len(failures) < 10:
        for target in TARGETS:
            rng = random.Random(f"{seed} {tried} {target.__name__}")
            try:
                target(rng)
            except Exception as error:
                failures.append(f"{target.__name__} seed {seed} input {tried}: {type(error).__name__}: {error}")
        tried += 1
    return tried * len(TARGETS), failures


_WATCHED = ("quota.core.recipe", "quota.server.errors", "quota.core.images", "quota.core.image_files", "quota.server.schemas", "PIL.Image", "PIL.ImageFile",
            "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "PIL.GifImagePlugin", "PIL.BmpImagePlugin", "PIL.TiffImagePlugin", "PIL.WebPImagePlugin")  # fmt: skip


def guided(seconds: int) -> None:
    """libFuzzer on raw bytes, from good inputs on: the first byte chooses the target. Does not return; a crash leaves its input in the working folder."""
    import atheris

    parsers: tuple[Callable[[bytes], Any], ...] = (
        lambda data: ChatRequest.model_validate_json(data).samplings(),
        lambda data: CompletionRequest.model_validate_json(data).samplings(),
        _parse_recipe,
        lambda data: decode(data, Limits(pixels=1_000_000)),
    )

    def one_input(data: bytes) -> None:
        if data:
            _refused(lambda: parsers[data[0] % len(parsers)](data[1:]))

    for module in _WATCHED:
        for _, owner in [("", import_module(module)), *inspect.getmembers(import_module(module), inspect.isclass)]:
            for _, function in inspect.getmembers(owner, inspect.isfunction):
                if function.__module__ == module:
                    atheris.instrument_func(function)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(_seeds()):
            Path(corpus, str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", corpus], one_input)
        atheris.Fuzz()


def _seeds() -> list[bytes]:
    """A good input for every target, and for every format of picture."""
    documents = [bytes([target]) + json.dumps(value).encode() for target, value in enumerate((CHAT, COMPLETION, RECIPE))]
    return documents + [b"\x03" + picture_bytes(random.Random(number), (24, 24)) for number in range(60)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", action="store_true", help="coverage-guided, with atheris")
    options = parser.parse_args()
    if options.guided:
        guided(int(options.seconds))
    tried, failures = fuzz(options.seconds, options.seed)
    print(json.dumps({"inputs": tried, "failures": failures}, indent=1))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
