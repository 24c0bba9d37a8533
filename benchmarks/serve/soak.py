"""Soak: thousands of mixed requests against a running server, then the accounts.

    quota serve CHECKPOINT --recipe RECIPE --port 8000 &
    python -m benchmarks.serve.soak http://127.0.0.1:8000 --requests 10000

Ends with status 1 when a good request was not answered as it is alone, a bad one was not refused, a page leaked or memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serve.traffic import Asked, request


@dataclass
class Account:
    """What happened. `problems` holds at most 20 sentences."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    compared: int = 0
    rss_bytes: list[int] = field(default_factory=list)

    def problem(self, text: str) -> None:
        self.outcomes["problem"] += 1
        if len(self.problems) < 20:
            self.problems.append(text)


async def soak(url: str, requests: int, clients: int, *, compare: float = 0.2, pid: int | None = None, first: int = 0) -> Account:
    """Send `requests` mixed requests from `clients` at once; a share `compare` of the good ones is asked again alone afterwards."""
    account, again = Account(), []
    limits = httpx.Limits(max_connections=clients + 2)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        numbers = iter(range(first, first + requests))

        async def client() -> None:
            for number in numbers:
                asked = request(number, model)
                answer = await _ask(http, asked, account)
                if answer is not None and random.Random(-number - 1).random() < compare:
                    again.append((asked, answer))
                if pid is not None and number % max(1, requests // 50) == 0:
                    account.rss_bytes.append(rss_bytes(pid))

        await asyncio.gather(*(client() for _ in range(clients)))
        await _settle(http, account)
        for asked, answer in again:
            account.compared += 1
            if await _ask(http, asked, Account()) != answer:
                account.problem(f"request {asked.number}: another answer alone than in company")
    return account


async def _ask(http: httpx.AsyncClient, asked: Asked, account: Account) -> Any:
    """The answer's choices in one form, streamed or whole; None where there should be none."""
    content = asked.body if isinstance(asked.body, bytes) else json.dumps(asked.body).encode()
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
    async with http.stream("POST", "/v1/chat/completions", content=content) as response:
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
    if metric(text, "kv_units_available") != metric(text, "kv_units"):
        account.problem(f"pages leaked: {metric(text, 'kv_units_available'):.0f} of {metric(text, 'kv_units'):.0f} units are available")


def metric(text: str, name: str) -> float:
    """One sample without labels of Prometheus' text form."""
    found = re.search(rf"^quota_{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else float("nan")


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def memory_growth(samples: list[int]) -> float:
    """Median of the last third over the median of the middle third: 1.0 is flat. The first third is warming up."""
    third = len(samples) // 3
    if not third:
        return 1.0
    middle, last = sorted(samples[third : 2 * third]), sorted(samples[-third:])
    return last[len(last) // 2] / middle[len(middle) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--compare", type=float, default=0.1, help="share of the good requests that is asked again alone")
    parser.add_argument("--pid", type=int, help="process of the server, to watch its memory")
    parser.add_argument("--first", type=int, default=0, help="number of the first request; other numbers, other requests")
    options = parser.parse_args()
    began = time.monotonic()
    account = asyncio.run(soak(options.url, options.requests, options.clients, compare=options.compare, pid=options.pid, first=options.first))
    growth = memory_growth(account.rss_bytes)
    if growth > 1.05:
        account.problem(f"memory grew by {100 * (growth - 1):.1f} %")
    report = {"requests": options.requests, "clients": options.clients, "seconds": round(time.monotonic() - began, 1), "outcomes": dict(account.outcomes),
              "compared": account.compared, "rss_mb": [round(b / 1e6) for b in account.rss_bytes[:: max(1, len(account.rss_bytes) // 10)]],
              "memory_growth": round(growth, 4), "problems": account.problems}  # fmt: skip
    print(json.dumps(report, indent=1))
    sys.exit(bool(account.problems))


if __name__ == "__main__":
    main()
