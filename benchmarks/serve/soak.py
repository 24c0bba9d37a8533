"""Soak: thousands of mixed requests against a server of its own, then the accounts.

    python -m benchmarks serve soak CHECKPOINT --recipe RECIPE --requests 10000 --out benchmarks/results/soak.json
    python -m tools.pages

Images of every kind and size, chats and plain text, streamed and whole, under several recipes; 10 % malformed, 10 %
of the clients hang up. Then a share of the good requests is asked again of a second server, which computes one at a
time and keeps nothing from one to the next. Ends with status 1 when a good request was not answered as it is alone, a
bad one was not refused, a page leaked, memory grew, the log holds an error or a server did not leave with status 0. The
report is written as the run goes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from tqdm import tqdm

from benchmarks import rows
from benchmarks.serve.process import Served, served
from benchmarks.serve.tables import soak_table
from benchmarks.serve.traffic import Asked, request
from quota.core.files import atomic_write_text

GROWTH_LIMIT = 1.05
SAMPLES = 120  # readings of the memory in a run
_ALONE = {"QUOTA_SERVE_PREFIX_CACHE": "false", "QUOTA_SERVE_FEATURE_BYTES": "0", "QUOTA_SERVE_MAX_RUNNING": "1"}


@dataclass
class Account:
    """What happened. `problems` holds at most 20 sentences."""

    outcomes: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    good: dict[int, Any] = field(default_factory=dict)  # number of the request -> its answer
    compared: int = 0
    differ: int = 0
    rss_bytes: list[int] = field(default_factory=list)

    def problem(self, text: str) -> None:
        self.outcomes["problem"] += 1
        if len(self.problems) < 20:
            self.problems.append(text)

    def note_images(self, asked: Asked) -> None:
        """Format, mode and size of every image that was sent well."""
        if isinstance(asked.body, bytes) or asked.expected == "refusal":
            return
        parts = [
            part
            for message in asked.body["messages"]
            if isinstance(message["content"], list)
            for part in message["content"]
        ]
        for url in (part["image_url"]["url"] for part in parts if part["type"] == "image_url"):
            with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
                animated = " animated" if getattr(image, "n_frames", 1) > 1 else ""
                self.images[f"{image.format} {image.mode}{animated}"] += 1
                self.sizes.append(image.size)


async def soak(
    url: str, numbers: range, clients: int, *, compare: float, watch: Callable[[Account], None] | None = None
) -> Account:
    """Send the mixed requests of these numbers from `clients` at once, and wait until the server is idle.

    compare: share of the good ones to keep in `Account.good` with their answers, for `recompute`. watch: called now and
    then.
    """
    account, every = Account(), max(1, len(numbers) // SAMPLES)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients + 2)) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        waiting = iter(numbers)

        async def client() -> None:
            for number in waiting:
                asked, content = await asyncio.to_thread(_prepared, number, model, account)
                answer = await _ask(http, asked, content, account)
                if answer is not None and random.Random(-number - 1).random() < compare:
                    account.good[number] = answer
                if watch is not None and number % every == 0:
                    watch(account)

        await asyncio.gather(*(client() for _ in range(clients)))
        await _settle(http, account)
    return account


async def recompute(
    url: str, account: Account, model: str, watch: Callable[[Account], None] | None = None, clients: int = 3
) -> None:
    """Ask the kept good requests again of a server that computes one at a time; another answer is a problem. clients:
    so many wait in its queue."""
    waiting = iter(account.good.items())
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:

        async def client() -> None:
            for number, answer in waiting:
                asked, content = await asyncio.to_thread(_prepared, number, model)
                found = await _ask(http, asked, content, Account())
                account.compared += 1
                if found != answer:
                    account.differ += 1
                    account.problem(f"request {number}: another answer alone than in company")
                if watch is not None and account.compared % 20 == 0:
                    watch(account)

        await asyncio.gather(*(client() for _ in range(clients)))


def _prepared(number: int, model: str, account: Account | None = None) -> tuple[Asked, bytes]:
    """A request and its body. Off the event loop: drawing there would let uploads stall into the server's time
    limit."""
    asked = request(number, model)
    if account is not None:
        account.note_images(asked)
    return asked, asked.body if isinstance(asked.body, bytes) else json.dumps(asked.body).encode()


async def _ask(http: httpx.AsyncClient, asked: Asked, content: bytes, account: Account) -> Any:
    """The answer's choices in one form, streamed or whole; None where there should be none."""
    try:
        if asked.expected == "leave":
            await asyncio.wait_for(_answer(http, content), random.Random(asked.number).uniform(0, 0.5))
            account.outcomes["left too late"] += 1
            return None
        status, found = await _answer(http, content)
    except TimeoutError:
        account.outcomes["left"] += 1
        return None
    except (httpx.HTTPError, ValueError) as error:
        account.problem(f"request {asked.number}: {type(error).__name__} {error}")
        return None
    account.outcomes[f"{asked.expected}: {status}"] += 1
    if (asked.expected == "answer") != (status == 200) or status >= 500:
        account.problem(f"request {asked.number}: expected {asked.expected}, got {status} {str(found)[:200]}")
    return found if status == 200 and asked.expected == "answer" else None


async def _answer(http: httpx.AsyncClient, content: bytes) -> tuple[int, Any]:
    async with http.stream(
        "POST", "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    ) as response:
        body = (await response.aread()).decode()
    if response.status_code != 200 or not body.startswith("data:"):
        found = json.loads(body)
        return response.status_code, _whole(found) if response.status_code == 200 else found
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    if not body.endswith("data: [DONE]\n\n") or any("error" in event for event in events):
        raise ValueError(f"a stream that broke off: {body[-200:]}")
    return 200, _streamed(events)


def _whole(body: Any) -> list[tuple[str, str]]:
    return [(choice["message"]["content"], choice["finish_reason"]) for choice in body["choices"]]


def _streamed(events: list[Any]) -> list[tuple[str, str]]:
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
        reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"], "")
    return [(texts[index], reasons[index]) for index in sorted(texts)]


async def _settle(http: httpx.AsyncClient, account: Account) -> None:
    """Wait until nothing runs; then every unit must be available."""
    for _ in range(600):
        text = (await http.get("/metrics")).text
        if metric(text, "requests_running") == metric(text, "requests_waiting") == 0:
            break
        await asyncio.sleep(0.1)
    if metric(text, "kv_blocks_available") != metric(text, "kv_blocks"):
        account.problem(
            f"pages leaked: {metric(text, 'kv_blocks_available'):.0f} of {metric(text, 'kv_blocks'):.0f} blocks are"
            " available"
        )


def metric(text: str, name: str) -> float:
    """One sample without labels of Prometheus' text form."""
    found = re.search(rf"^quota_{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else float("nan")


def memory_growth(samples: list[int]) -> float:
    """Median of the last third over the median of the middle third: 1.0 is flat. The first third is warming up."""
    third = len(samples) // 3
    if not third:
        return 1.0
    middle, last = sorted(samples[third : 2 * third]), sorted(samples[-third:])
    return last[len(last) // 2] / middle[len(middle) // 2]


def faults_in(log: Path) -> list[str]:
    """Lines of the server's log that are errors."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [
        f"log: {entry['message']} {entry.get('exception', '')[-200:]}"
        for entry in entries
        if entry["level"] in ("error", "critical")
    ]


def report(account: Account, options: argparse.Namespace, seconds: float, state: str) -> dict[str, Any]:
    sides = [side for size in account.sizes for side in size]
    largest = max(account.sizes, key=lambda size: size[0] * size[1], default=None)
    return {
        **rows.stamp(options.threads),
        "state": state,
        "requests": options.requests,
        "first": options.first,
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(account.outcomes.items())),
        "answers_kept": len(account.good),
        "answers_compared_alone": account.compared,
        "answers_that_differ": account.differ,
        "images": dict(account.images.most_common()),
        "shortest_side_px": min(sides, default=None),
        "largest_image_px": largest,
        "rss_mb": [round(b / 1e6, 1) for b in account.rss_bytes],
        "memory_growth": round(memory_growth(account.rss_bytes), 4),
        "problems": account.problems,
    }


def run(options: argparse.Namespace) -> Account:
    """The whole soak, report included."""
    flags = [
        "--threads",
        str(options.threads),
        "--model-name",
        "soak",
        *(["--recipe", f"quota={options.recipe}"] if options.recipe else []),
    ]
    began, account = time.monotonic(), Account()

    def save(state: str) -> None:
        if options.out is not None:
            found = report(account, options, time.monotonic() - began, state)
            atomic_write_text(options.out, json.dumps(found, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        log = Path(folder, "log")
        server = stack.enter_context(served(options.checkpoint, *flags, log=log))
        bar = stack.enter_context(tqdm(total=options.requests, unit="request", mininterval=2))

        def watch(so_far: Account) -> None:
            nonlocal account
            account = so_far
            account.rss_bytes.append(server.rss_bytes())
            bar.update(sum(account.outcomes.values()) - bar.n)
            save("running")

        numbers = range(options.first, options.first + options.requests)
        account = asyncio.run(soak(server.url, numbers, options.clients, compare=options.compare, watch=watch))
        _close(account, server, log)
        alone = stack.enter_context(served(options.checkpoint, *flags, environment=_ALONE))
        bar.reset(len(account.good))

        def follow(so_far: Account) -> None:
            bar.update(so_far.compared - bar.n)
            save("comparing")

        asyncio.run(recompute(alone.url, account, "soak", follow))
        if status := alone.stop():
            account.problem(f"the server of single requests left with status {status} after SIGTERM")
    save("finished")
    print(soak_table(report(account, options, time.monotonic() - began, "finished")))
    return account


def _close(account: Account, server: Served, log: Path) -> None:
    growth = memory_growth(account.rss_bytes)
    if growth > GROWTH_LIMIT:
        account.problem(f"memory grew by {100 * (growth - 1):.1f} %")
    if server.process.poll() is not None:
        account.problem(f"the server ended in the middle with status {server.process.returncode}")
    elif status := server.stop():
        account.problem(f"the server left with status {status} after SIGTERM")
    for text in faults_in(log):
        account.problem(text)


def main(arguments: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--recipe", help="recipe of the server; requests use it, other keep ratios of it, and none")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument(
        "--compare", type=float, default=0.05, help="share of the good requests that is asked again alone"
    )
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first request; other numbers, other requests"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the report goes, as JSON")
    options = parser.parse_args(arguments)
    os.environ["QUOTA_SERVE_KV_BYTES"] = os.environ.get("QUOTA_SERVE_KV_BYTES", str(64 << 20))
    sys.exit(bool(run(options).problems))
