"""Tokens per second and latency at several numbers of clients, against transformers' generate on the same work.

    python -m benchmarks.serve.throughput CHECKPOINT --recipe RECIPE [--float FLOAT_CHECKPOINT] --clients 1,4,16,64

The server is a process of its own on the loopback interface; clients are coroutines here, each asking one question after the other about a
picture of its own. Before a row is timed, its answers are compared with those given one at a time: a row that fails is not printed. One line
of JSON per row.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx

from benchmarks.serve.traffic import QUESTIONS, picture_bytes, user

TOKENS = 32


def body(model: str, number: int, recipe: str | None) -> dict[str, Any]:
    """Question `number`, always exactly the same, answered with exactly TOKENS tokens."""
    rng = random.Random(number)
    messages = [user(QUESTIONS[number % len(QUESTIONS)], picture_bytes(rng, (400, 300)))]
    more = {} if recipe is None else {"recipe": recipe}
    return {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 1.0, "seed": number, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True}, **more}  # fmt: skip


@contextlib.contextmanager
def server(checkpoint: str, recipe: str | None, threads: int) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "quota.cli.main", "serve", checkpoint, "--port", str(port), "--threads", str(threads), "--max-running", "128"]
    command += ["--recipe", f"quota={recipe}"] if recipe else []
    with subprocess.Popen([*command, "--log-file", os.devnull]) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(1200):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/ready").status_code == 200:
                        break
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()


async def timed(http: httpx.AsyncClient, asked: dict[str, Any]) -> tuple[str, list[float]]:
    """(text, seconds from the request to each piece of text). RuntimeError when there were not exactly TOKENS tokens."""
    began, text, times, tokens = time.perf_counter(), "", [], 0
    async with http.stream("POST", "/v1/chat/completions", json=asked) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                tokens = event.get("usage", {}).get("completion_tokens", tokens)
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        text += choice["delta"]["content"]
                        times.append(time.perf_counter() - began)
    if tokens != TOKENS:
        raise RuntimeError(f"expected {TOKENS} tokens, got {tokens}")
    return text, times


async def measure(url: str, clients: int, per_client: int, recipe: str | None) -> dict[str, Any]:
    """One row, after its gate."""
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients + 2)) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        gate = [body(model, number, recipe) for number in range(min(clients, 16))]
        alone = [(await timed(http, asked))[0] for asked in gate]
        together = [text for text, _ in await asyncio.gather(*(timed(http, asked) for asked in gate))]
        if alone != together:
            raise SystemExit(f"{clients} clients: answers differ from those given alone; nothing is timed")
        found: list[list[float]] = []

        async def client(index: int) -> None:
            for turn in range(per_client):
                found.append((await timed(http, body(model, 1000 + index * per_client + turn, recipe)))[1])

        began = time.perf_counter()
        await asyncio.gather(*(client(index) for index in range(clients)))
        seconds = time.perf_counter() - began
    tokens = TOKENS * len(found)
    first = sorted(times[0] for times in found if times)
    between = sorted(b - a for times in found for a, b in pairwise(times))
    return {
        "clients": clients, "requests": len(found), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1),
        "requests_per_s": round(len(found) / seconds, 2),
        "ttft_p50_ms": _ms(first, 0.5), "ttft_p99_ms": _ms(first, 0.99), "itl_p50_ms": _ms(between, 0.5), "itl_p99_ms": _ms(between, 0.99),
    }  # fmt: skip


def _ms(values: list[float], share: float) -> float | None:
    return round(1e3 * values[min(len(values) - 1, int(share * len(values)))], 1) if values else None


def peer(checkpoint: str, clients: int, threads: int, per_client: int) -> dict[str, Any]:
    """transformers' generate in this process: batches of `clients` requests, exactly TOKENS tokens each, nothing pruned. Time to first token is
    not reported: generate returns a batch when its last row is done."""
    import io

    import torch
    from PIL import Image

    from quota.runtime.load import load

    torch.set_num_threads(threads)
    model = load(checkpoint)
    processor, tokens, seconds = model.processor, 0, 0.0
    for turn in range(per_client + 1):
        numbers = range(turn * clients, (turn + 1) * clients)
        images = [Image.open(io.BytesIO(picture_bytes(random.Random(n), (400, 300)))).convert("RGB") for n in numbers]
        texts = [f"USER: <image>\n{QUESTIONS[n % len(QUESTIONS)]} ASSISTANT:" for n in numbers]
        began = time.perf_counter()
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        if turn:  # the first batch warms up
            seconds += time.perf_counter() - began
            tokens += TOKENS * clients
    return {"clients": clients, "requests": clients * per_client, "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--recipe", help="also measured under this recipe")
    parser.add_argument("--float", dest="float_checkpoint", help="float checkpoint for the peer rows; default: the quantized one only")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--per-client", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    counts = [int(count) for count in options.clients.split(",")]
    common = {"threads": options.threads, "load_average": os.getloadavg()[0]}
    with server(options.checkpoint, options.recipe, options.threads) as url:
        for count in counts:
            for recipe in [None, "quota"] if options.recipe else [None]:
                row = asyncio.run(measure(url, count, max(1, options.per_client if count < 64 else 1), recipe or ("none" if options.recipe else None)))
                print(json.dumps({"engine": "quota serve", "recipe": recipe, **row, **common}), flush=True)
    for name, checkpoint in (("transformers generate, quantized", options.checkpoint), ("transformers generate, float", options.float_checkpoint)):
        for count in [count for count in counts if count <= 16] if checkpoint else []:
            print(json.dumps({"engine": name, "recipe": None, **peer(checkpoint, count, options.threads, 2), **common}), flush=True)


if __name__ == "__main__":
    main()
