"""Attacks on a server of its own, each at full size while a well-behaved client with a key of its own asks on; how long
that one waits, and what memory the server takes.

    python -m benchmarks serve attack CHECKPOINT --out benchmarks/results/attack.json
    python -m tools.pages

Ends with status 1 when an attack has another outcome than expected, the well-behaved client is refused or waits longer
than a second more than alone, or memory grows by more than the bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks import rows
from benchmarks.serve.attacks import ATTACKS, CHAT, OK, Attack, Target, ordinary
from benchmarks.serve.process import Served, served
from benchmarks.serve.tables import attack_table
from quota.core.files import atomic_write_text

MAX_DELAY_S = 1.0
KEYS = "attacker", "witness"
GROWTH_BYTES = 512 << 20  # the budget of bodies, and what one of them becomes when it is parsed


@dataclass
class Witness:
    """A well-behaved client: a small question, again and again. images: every other one about an image. waits_s: how
    long each answer took."""

    target: Target
    images: bool = False
    waits_s: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Asks in a thread of its own until the end of the block, and at least three times."""
        done = threading.Event()
        thread = threading.Thread(target=self._ask, args=(done,))
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _ask(self, done: threading.Event) -> None:
        with httpx.Client(base_url=self.target.url, headers=self.target.headers, timeout=300) as http:
            while not done.is_set() or len(self.waits_s) < 3:
                number = len(self.waits_s)
                body = (
                    self.target.about(ordinary(number), max_tokens=2)
                    if self.images and number % 2
                    else self.target.body(max_tokens=2)
                )
                began = time.monotonic()
                try:
                    status = str(http.post(CHAT, json=body).status_code)
                except httpx.TransportError as error:
                    status = type(error).__name__
                self.waits_s.append(time.monotonic() - began)
                if status != "200":
                    self.refused[status] += 1
                time.sleep(0.05)


def attacked(attack: Attack, target: Target, rss_bytes: Callable[[], int] | None = None) -> dict[str, Any]:
    """One attack with a witness before and during it."""
    other = replace(target, key=KEYS[1])
    before, during = Witness(other, attack.images), Witness(other, attack.images)
    with before.asking():
        time.sleep(2 * target.scale)
    start = peak = rss_bytes() if rss_bytes else 0
    outcomes: Counter[str] = Counter()
    with during.asking(), _watched(rss_bytes) as seen:
        outcomes.update(attack.send(target))
    peak = max([start, *seen])
    wrong = sorted(set(outcomes) - attack.expected)
    return {
        "attack": attack.name,
        "bound": attack.bound,
        "outcomes": dict(outcomes),
        "unexpected": wrong,
        "witness_refused": dict(during.refused),
        "alone_s": max(before.waits_s),
        "attacked_s": max(during.waits_s),
        "questions": len(during.waits_s),
        "growth_bytes": peak - start,
    }


@contextlib.contextmanager
def _watched(rss_bytes: Callable[[], int] | None) -> Iterator[list[int]]:
    """Readings of the memory, every 10 ms."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while rss_bytes is not None and not done.wait(0.01):
            seen.append(rss_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


_KEYS = {"QUOTA_SERVE_API_KEYS": ",".join(KEYS)}


def _target(server: Served) -> Target:
    at = Target(server.url, "", key=KEYS[0])
    return replace(at, model=httpx.get(f"{server.url}/v1/models", headers=at.headers).json()["data"][0]["id"])


def unread_log(checkpoint: str, flags: list[str]) -> dict[str, Any]:
    """A server whose standard error is a pipe that nobody reads: thousands of lines, then SIGTERM."""
    read, write = os.pipe()
    try:
        with served(checkpoint, *flags, environment=_KEYS, log=None, stderr=write) as server:
            target = _target(server)
            flood = Attack(
                "8000 requests while nobody reads the log",
                "4096 lines wait, further ones are counted as lost",
                _flood,
                OK,
            )
            found = attacked(flood, target, server.family_bytes)
            if status := server.stop():
                found["unexpected"].append(f"status {status} after SIGTERM")
    finally:
        os.close(read)
        os.close(write)
    return found


def _flood(target: Target) -> Iterator[str]:
    with httpx.Client(base_url=target.url, timeout=60) as http:
        for _ in range(target.of(8000)):
            yield str(http.get("/health").status_code)


def problems_of(found: list[dict[str, Any]]) -> list[str]:
    problems = []
    for row in found:
        if row["unexpected"] or row["witness_refused"]:
            problems.append(f"{row['attack']}: {row['unexpected']} {row['witness_refused']}")
        if row["attacked_s"] > row["alone_s"] + MAX_DELAY_S:
            problems.append(f"{row['attack']}: others wait {row['attacked_s']:.2f} s, alone {row['alone_s']:.2f} s")
        if row["growth_bytes"] > GROWTH_BYTES:
            problems.append(f"{row['attack']}: memory grew by {row['growth_bytes'] >> 20} MiB")
    return problems


def run(options: argparse.Namespace) -> list[str]:
    flags = ["--threads", str(options.threads), "--kv-bytes", "64M"]
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        served(options.checkpoint, *flags, environment=_KEYS, log=Path(folder, "log")) as server,
    ):
        target = _target(server)
        for attack in ATTACKS:
            if options.only in attack.name:
                found.append(_told(attacked(attack, target, server.family_bytes)))
                _settle(server)
    if options.only in "log":
        found.append(_told(unread_log(options.checkpoint, flags)))
    report = {**rows.stamp(options.threads), "attacks": found, "problems": problems_of(found)}
    if options.out:
        atomic_write_text(options.out, json.dumps(report, indent=1) + "\n")
    print(attack_table(report))
    return problems_of(found)


def _told(row: dict[str, Any]) -> dict[str, Any]:
    print(
        f"{row['attack']}: {row['outcomes']}, others {row['attacked_s']:.2f} s, alone {row['alone_s']:.2f} s,"
        f" +{row['growth_bytes'] >> 20} MiB",
        file=sys.stderr,
        flush=True,
    )
    return row


def _settle(server: Served) -> None:
    """Until nothing of the last attack runs."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            text = http.get("/metrics").text
            if "quota_requests_running 0.0" in text and "quota_requests_waiting 0.0" in text:
                return
            time.sleep(0.2)


def main(arguments: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    parser.add_argument("--out", type=Path, help="where the report goes, as JSON")
    problems = run(parser.parse_args(arguments))
    print("\n".join(problems))
    sys.exit(bool(problems))
