"""Table 7: what the arithmetic costs and whether the native kernels answer as their reference does. Each row runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quota.calib.stream import resolve_folder
from quota.core.errors import UsageError
from quota.eval.benchmark import weight_bytes
from quota.report.table import byte_size
from quota.study.bench import FLOAT, QUANTIZED, REFERENCE_OPS, Bench, Entry
from quota.study.tables import Plan


def runtime(bench: Bench) -> Plan:
    """Float, and W4A4KV4 by the native kernels and by the reference ops, unpruned and with QUOTA's recipe."""
    quantized, joint = bench.quantized(), bench.planned("quota", bench.settings.keep)
    rows = [
        Entry("float", bench.float_checkpoint, FLOAT), Entry("w4a4kv4, native", quantized, f"{QUANTIZED}, native"),
        Entry("w4a4kv4 + quota, native", quantized, f"{QUANTIZED}, native", joint),
    ]  # fmt: skip
    for entry in rows:
        entry.figures.update(_figures(entry, measure(bench, entry)))
    fake = [Entry(e.name.replace("native", "reference"), e.checkpoint, f"{QUANTIZED}, reference", e.recipe, reference=True) for e in rows[1:]]
    for entry in fake:
        entry.figures.update(_figures(entry, measure(bench, entry)))
    agreement = [(native.name, reference.name) for native, reference in zip(rows[1:], fake, strict=True)]
    return Plan("Disk, peak memory and power; native against reference arithmetic", rows + fake, agreement)


def measure(bench: Bench, entry: Entry) -> dict[str, Any]:
    """Peak memory, seconds and energy of answering a few questions in a fresh process; kept in the cache."""
    s = bench.settings
    parts = {"checkpoint": bench.content(entry.checkpoint), "recipe": entry.recipe and entry.recipe.dumps(), "reference": entry.reference, "tasks": s.tasks}

    def work(path: Path) -> None:
        asked = {
            "checkpoint": str(resolve_folder(entry.checkpoint)), "recipe": entry.recipe.model_dump(mode="json") if entry.recipe else None,
            "tasks": s.tasks, "questions": min(s.questions, 24), "max_new_tokens": s.max_new_tokens,
        }  # fmt: skip
        environment = dict(os.environ)
        if entry.reference:
            environment["QUOTA_IMPL"] = REFERENCE_OPS
        done = subprocess.run([sys.executable, "-m", "quota.study.worker"], input=json.dumps(asked), capture_output=True, text=True, env=environment)
        if done.returncode:
            raise UsageError(f"runtime: the measuring process for {entry.name!r} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        path.write_text(done.stdout.splitlines()[-1])

    return json.loads(bench.cache.make("runtime", parts, work).read_text())


def _figures(entry: Entry, found: dict[str, Any]) -> dict[str, str]:
    power = found["power_w"]
    return {
        "disk": byte_size(weight_bytes(resolve_folder(entry.checkpoint))), "peak memory": byte_size(found["peak_bytes"]),
        "of it before loading": byte_size(found["idle_bytes"]), "power": f"{power:.1f} W" if power is not None else found["power_why_not"],
        "ms per question": f"{found['ms_per_question']:.0f}",
    }  # fmt: skip
