"""Tokens per second and latency at several numbers of clients, against other engines on the same work.

    python -m benchmarks serve throughput CHECKPOINT --recipe RECIPE --float FLOAT_CHECKPOINT --out
    benchmarks/results/serve.jsonl
    python -m tools.pages

A server is a process of its own on the loopback interface; clients are coroutines here, each asking one question after
the other about a picture that nobody asked about before. Every answer has the same number of tokens (--tokens: short
ones are mostly prefill, long ones mostly decoding). Before a server's row is timed, answers are compared with those
given one at a time: a row that fails is named and not timed. Rows are JSON lines; what --out holds for the same commit
and machine is not measured again. Peers: benchmarks/serve/peers.py and benchmarks/serve/genai.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import rows
from benchmarks.serve import genai, peers
from benchmarks.serve.process import Served, running, served
from benchmarks.serve.traffic import user

TOKENS = 32  # of an answer
SIZE = (400, 300)  # the largest picture
_GATE = 16  # answers that are compared
ENGINES = ("quota serve", "transformers serve", "transformers generate", "openvino genai")


def plain_body(model: str, number: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Question `number` for a server that knows neither recipes nor seeds per request."""
    text, picture = peers.question(number, SIZE)
    return {"model": model, "messages": [user(text, picture)], "max_tokens": tokens, "temperature": 0.0, "stream": True}


def body(model: str, number: int, recipe: str | None, tokens: int = TOKENS) -> dict[str, Any]:
    """Question `number`, always exactly the same, answered with exactly `tokens` tokens."""
    more = {} if recipe is None else {"recipe": recipe}
    sampled = {"temperature": 1.0, "seed": number, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return {**plain_body(model, number, tokens), **sampled, **more}


async def timed(http: httpx.AsyncClient, content: bytes, tokens: int) -> tuple[str, list[float]]:
    """(text, seconds from the request to each piece of text). RuntimeError when there were not exactly `tokens`
    tokens."""
    began, text, times, got = time.perf_counter(), "", [], 0
    async with http.stream(
        "POST", "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    ) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                got = (event.get("usage") or {}).get("completion_tokens", got)
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        text += choice["delta"]["content"]
                        times.append(time.perf_counter() - began)
    if got != tokens:
        raise RuntimeError(f"expected {tokens} tokens, got {got}")
    return text, times


async def measure(
    url: str,
    cpu_s: Callable[[], float],
    clients: int,
    requests: int,
    asked_of: Callable[[int], dict[str, Any]],
    first: int = 0,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """One row, after its gate. cpu_s: processor time of the server; asked_of: number -> body with answers of `tokens`,
    asked from `first` on."""
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients + 2)) as http:
        gate, *asked = _encoded(asked_of, range(first, first + min(clients, _GATE) + requests), requests)
        alone = [(await timed(http, content, tokens))[0] for content in gate]
        together = [text for text, _ in await asyncio.gather(*(timed(http, content, tokens) for content in gate))]
        if alone != together:
            raise RuntimeError(f"{clients} clients: answers differ from those given alone; nothing is timed")
        found: list[list[float]] = []
        waiting = iter(asked)

        async def client() -> None:
            for content in waiting:
                found.append((await timed(http, content, tokens))[1])

        began, spent = time.perf_counter(), cpu_s()
        await asyncio.gather(*(client() for _ in range(clients)))
        return summary(time.perf_counter() - began, cpu_s() - spent, found, tokens)


def _encoded(asked_of: Callable[[int], dict[str, Any]], numbers: range, requests: int) -> list[Any]:
    """[bodies of the gate, body, body, ...], made before the clock runs."""
    made = [json.dumps(asked_of(number)).encode() for number in numbers]
    return [made[:-requests], *made[-requests:]]


def summary(seconds: float, cpu_s: float, found: Sequence[Sequence[float]], tokens: int) -> dict[str, Any]:
    """The columns of a row. cpu_s: processor time of the engine; found: for every request, seconds until each piece of
    its text."""
    all_tokens = tokens * len(found)
    first = sorted(times[0] for times in found if times)
    between = sorted(b - a for times in found for a, b in pairwise(times))
    return {
        "requests": len(found),
        "tokens_per_s": round(all_tokens / seconds, 1),
        "cpu_ms_per_token": round(1e3 * cpu_s / all_tokens, 3),
        "ttft_ms": [_ms(first, 0.5), _ms(first, 0.99)],
        "inter_token_ms": [_ms(between, 0.5), _ms(between, 0.99)],
        "seconds": round(seconds, 2),
    }


def _ms(values: Sequence[float], share: float) -> float | None:
    return round(1e3 * values[min(len(values) - 1, int(share * len(values)))], 2) if values else None


class Rows:
    """Where rows go: standard output, and a file that already holds some of them."""

    def __init__(self, out: Path | None, shape: str, threads: int, tokens: int) -> None:
        self.out, self.shape, self.threads, self.tokens = out, shape, threads, tokens
        self.known = {self._key(row) for row in rows.read(out)} if out is not None else set()

    def _key(self, row: dict[str, Any]) -> str:
        return f"{rows.case_key(row)} {row['implementation']}"

    def add(
        self, implementation: str, clients: int, measured: Callable[[], dict[str, Any]], *, note: str | None = None
    ) -> None:
        """Measure one row, unless it is there already."""
        row = {
            **rows.stamp(self.threads),
            "op": "serve",
            "shape": self.shape,
            "size": {"clients": clients, "new": self.tokens},
            "weights": "resident",
            "implementation": implementation,
            "ours": implementation.startswith("quota"),
        }
        if self._key(row) in self.known:
            return
        try:
            row |= measured()
        except RuntimeError as error:
            print(
                json.dumps({"implementation": implementation, "clients": clients, "not_measured": str(error)}),
                flush=True,
            )
            return
        row |= {"note": note} if note else {}
        print(json.dumps(row), flush=True)
        if self.out is not None:
            rows.append(self.out, [row])


def main(arguments: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--recipe", help="also measured under this recipe")
    parser.add_argument(
        "--float", dest="float_checkpoint", help="float checkpoint of the peers; without it there are none"
    )
    parser.add_argument("--shape", default="embedded", help="what the model is called in the table")
    parser.add_argument("--engines", default=",".join(ENGINES), help="which to measure, with commas")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--requests", type=int, default=64, help="per row; at least two per client")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of every answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="rows are appended here")
    options = parser.parse_args(arguments)
    wrong = set(options.engines.split(",")) - set(ENGINES)
    if wrong:
        parser.error(f"--engines: expected some of {', '.join(ENGINES)}, got {', '.join(wrong)}")
    made = Rows(options.out, options.shape, options.threads, options.tokens)
    counts = [int(count) for count in options.clients.split(",")]
    work = {count: max(options.requests, 2 * count) for count in counts}
    torch.set_num_threads(options.threads)
    for engine in options.engines.split(","):
        if engine == "quota serve":
            _ours(made, options, work)
        elif options.float_checkpoint:
            _PEERS[engine](made, options, work)


def _ours(made: Rows, options: argparse.Namespace, work: dict[int, int]) -> None:
    flags = [
        "--threads",
        str(options.threads),
        "--max-running",
        "128",
        "--model-name",
        "m",
        *(["--recipe", f"q={options.recipe}"] if options.recipe else []),
    ]
    recipes = {"quota serve": "none", "quota serve, recipe": "q"} if options.recipe else {"quota serve": None}
    numbers = _fresh()
    with served(options.checkpoint, *flags) as server:
        for clients, requests in work.items():
            for name, recipe in recipes.items():
                asked_of = partial(body, "m", recipe=recipe, tokens=options.tokens)
                made.add(
                    name,
                    clients,
                    partial(_over_http, server, clients, requests, asked_of, next(numbers), options.tokens),
                )


def _transformers_serve(made: Rows, options: argparse.Namespace, work: dict[int, int]) -> None:
    numbers, environment = _fresh(), peers.threads(options.threads)
    with (
        peers.endless(options.float_checkpoint) as copy,
        running(lambda port: peers.serve_command(copy, port), "/health", environment) as server,
    ):
        for clients, requests in work.items():
            asked_of = partial(plain_body, copy, tokens=options.tokens)
            made.add(
                "transformers serve",
                clients,
                partial(_over_http, server, clients, requests, asked_of, next(numbers), options.tokens),
            )


def _over_http(server: Served, *args: Any) -> dict[str, Any]:
    return asyncio.run(measure(server.url, server.cpu_s, *args))


def _generate(made: Rows, options: argparse.Namespace, work: dict[int, int]) -> None:
    for clients, requests in work.items():
        run = partial(peers.generate, options.float_checkpoint, clients, options.tokens, requests // clients, SIZE)
        made.add("transformers generate", clients, partial(_summary_of, run, options.tokens))


def _genai(made: Rows, options: argparse.Namespace, work: dict[int, int]) -> None:
    with genai.engine(options.float_checkpoint, options.threads) as engine:
        for clients, requests in work.items():
            run = partial(genai.measure, engine, clients, requests, options.tokens)
            made.add("openvino genai", clients, partial(_summary_of, run, options.tokens), note=genai.NOTE)


def _summary_of(run: Callable[[], tuple[float, float, Sequence[Sequence[float]]]], tokens: int) -> dict[str, Any]:
    return summary(*run(), tokens)


_PEERS = {"transformers serve": _transformers_serve, "transformers generate": _generate, "openvino genai": _genai}


def _fresh() -> Iterator[int]:
    """First numbers of questions for one row after the other: no row's pictures are known to the server from
    another."""
    return iter(range(0, 1 << 40, 1 << 20))
