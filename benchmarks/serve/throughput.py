"""Tokens per second and latency at several numbers of clients, against transformers' generate and server on the same work.

    python -m benchmarks.serve.throughput CHECKPOINT --recipe RECIPE [--float FLOAT_CHECKPOINT] --clients 1,4,16,64

A server is a process of its own on the loopback interface; clients are coroutines here, each asking one question after the other about a
picture of its own. Before a row is timed, its answers are compared with those given one at a time: a row that fails is not printed. One line
of JSON per row.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.serve import peers
from benchmarks.serve.traffic import user

TOKENS = 32
SIZE = (400, 300)  # the largest picture


def plain_body(model: str, number: int) -> dict[str, Any]:
    """Question `number` for a server that knows neither recipes nor seeds per request."""
    text, picture = peers.question(number, SIZE)
    return {"model": model, "messages": [user(text, picture)], "max_tokens": TOKENS, "temperature": 0.0, "stream": True}


def body(model: str, number: int, recipe: str | None) -> dict[str, Any]:
    """Question `number`, always exactly the same, answered with exactly TOKENS tokens."""
    text, picture = peers.question(number, SIZE)
    messages = [user(text, picture)]
    more = {} if recipe is None else {"recipe": recipe}
    return {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 1.0, "seed": number, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True}, **more}  # fmt: skip


@contextlib.contextmanager
def server(checkpoint: str, recipe: str | None, threads: int) -> Iterator[str]:
    """Our server's address."""

    def command(port: int) -> tuple[list[str], dict[str, str]]:
        line = [sys.executable, "-m", "quota.cli.main", "serve", checkpoint, "--port", str(port), "--threads", str(threads), "--max-running", "128"]
        return [*line, *(["--recipe", f"quota={recipe}"] if recipe else []), "--log-file", os.devnull], {}

    with running(command, "/ready") as url:
        yield url


@contextlib.contextmanager
def running(command_of: Callable[[int], tuple[list[str], dict[str, str]]], ready: str) -> Iterator[str]:
    """The address of a server once `ready` answers; command_of: port -> command line and additions to the environment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command, environment = command_of(port)
    with subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(1200):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}{ready}").status_code == 200:
                        break
                if process.poll() is not None:
                    raise SystemExit(f"{command[:3]} ended with status {process.returncode} before it served")
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
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        text += choice["delta"]["content"]
                        times.append(time.perf_counter() - began)
    if tokens != TOKENS:
        raise RuntimeError(f"expected {TOKENS} tokens, got {tokens}")
    return text, times


async def measure(url: str, clients: int, per_client: int, asked_of: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """One row, after its gate. asked_of: number -> body."""
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients + 2)) as http:
        gate = [asked_of(number) for number in range(min(clients, 16))]
        alone = [(await timed(http, asked))[0] for asked in gate]
        together = [text for text, _ in await asyncio.gather(*(timed(http, asked) for asked in gate))]
        if alone != together:
            raise SystemExit(f"{clients} clients: answers differ from those given alone; nothing is timed")
        found: list[list[float]] = []

        async def client(index: int) -> None:
            for turn in range(per_client):
                found.append((await timed(http, asked_of(1000 + index * per_client + turn)))[1])

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

    def say(engine: str, recipe: str | None, row: dict[str, Any]) -> None:
        print(json.dumps({"engine": engine, "recipe": recipe, **row, "threads": options.threads, "load_average": os.getloadavg()[0]}), flush=True)

    name = Path(options.checkpoint).resolve().name
    with server(options.checkpoint, options.recipe, options.threads) as url:
        for count in counts:
            for recipe in [None, "quota"] if options.recipe else [None]:
                asked_of = partial(body, name, recipe=recipe or ("none" if options.recipe else None))
                say("quota serve", recipe, asyncio.run(measure(url, count, max(1, options.per_client if count < 64 else 1), asked_of)))
    small = [count for count in counts if count <= 16]
    if options.float_checkpoint:
        with peers.endless(options.float_checkpoint) as copy, running(lambda port: peers.serve_command(copy, port, options.threads), "/health") as url:
            for count in small:  # it answers one request after the other
                say("transformers serve, float", None, asyncio.run(measure(url, count, options.per_client, partial(plain_body, copy))))
    torch.set_num_threads(options.threads)
    for engine, checkpoint in (("transformers generate, quantized", options.checkpoint), ("transformers generate, float", options.float_checkpoint)):
        for count in small if checkpoint else []:
            say(engine, None, peers.generate(checkpoint, count, TOKENS, 2, SIZE))


if __name__ == "__main__":
    main()
