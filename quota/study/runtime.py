"""Table 7: what the arithmetic costs, and whether the native kernels answer as their reference does. Every figure comes
from a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import quota.ops  # noqa: F401 - registers the ops
from quota.calib.stream import resolve_folder
from quota.core.errors import UsageError
from quota.core.registry import ops
from quota.eval.benchmark import weight_bytes
from quota.eval.pipeline import FLOAT, QUANTIZED, Entry
from quota.report.table import byte_size
from quota.study.bench import Bench
from quota.study.tables import Plan

MEASURED = 24  # questions behind memory, power and time
CHECKED = 2  # questions answered once more by the reference of every op, which is the definition and slow


def runtime(bench: Bench) -> Plan:
    """Float, and W4A4KV4 unpruned and with QUOTA's recipe."""
    quantized, joint = bench.quantized(), bench.planned("quota", bench.settings.keep)
    rows = [
        Entry(FLOAT, bench.float_checkpoint, FLOAT),
        Entry(QUANTIZED, quantized, QUANTIZED),
        Entry(f"{QUANTIZED} + quota", quantized, QUANTIZED, joint),
    ]
    for entry in rows:
        found = measure(bench, entry, min(bench.settings.questions, MEASURED))
        entry.figures.update(_figures(entry, found))
        if entry.weights != FLOAT:
            checked = measure(bench, entry, min(bench.settings.questions, CHECKED), reference=True)["answers"]
            same = sum(a == b for a, b in zip(checked, found["answers"], strict=False))
            entry.figures["answers equal to the reference's"] = f"{same} of {len(checked)}"
    pairs = [(QUANTIZED, FLOAT), (f"{QUANTIZED} + quota", QUANTIZED)]
    return Plan("Disk, peak memory, power and time", rows, pairs)


def measure(bench: Bench, entry: Entry, questions: int, reference: bool = False) -> dict[str, Any]:
    """Answers, peak memory, CPU time of all threads and energy of the first `questions` questions in a fresh process;
    kept in the cache.

    reference: by the reference implementation of every op.
    """
    s = bench.settings
    parts = {
        "checkpoint": bench.content(entry.checkpoint),
        "recipe": entry.recipe and entry.recipe.dumps(),
        "tasks": s.tasks,
        "questions": questions,
        "max_new_tokens": s.max_new_tokens,
        "reference": reference,
        "clock": "cpu",
        **({"place": s.place.key} if s.place.key else {}),
    }

    def work(path: Path) -> None:
        bench.console.print(
            f"measuring {entry.name}{' by the reference ops' if reference else ''}: {questions} questions in a process"
            " of their own"
        )
        asked = {
            "checkpoint": str(resolve_folder(entry.checkpoint)),
            "recipe": entry.recipe.model_dump(mode="json") if entry.recipe else None,
            "tasks": s.tasks,
            "questions": questions,
            "max_new_tokens": s.max_new_tokens,
            "place": [s.place.device, s.place.dtype],
        }
        environment = (
            {**os.environ, "QUOTA_IMPL": ",".join(f"{op}=ref" for op in ops())} if reference else dict(os.environ)
        )
        done = subprocess.run(
            [sys.executable, "-m", "quota.study.worker"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            env=environment,
        )
        if done.returncode:
            raise UsageError(
                f"runtime: the measuring process for {entry.name!r} failed:"
                f" {(done.stderr.strip() or 'no message').splitlines()[-1]}"
            )
        path.write_text(done.stdout.splitlines()[-1])

    return json.loads(bench.cache.make("runtime", parts, work).read_text())


def _figures(entry: Entry, found: dict[str, Any]) -> dict[str, str]:
    power, gpu = found["power_w"], found.get("gpu")
    figures = {
        "disk": byte_size(weight_bytes(resolve_folder(entry.checkpoint))),
        "peak memory": byte_size(found["peak_bytes"]),
        "of it before loading": byte_size(found["idle_bytes"]),
        "power": f"{power:.1f} W" if power is not None else found["power_why_not"],
        "CPU ms per question": f"{found['cpu_ms_per_question']:.0f}",
    }
    if gpu:
        figures |= {
            "GPU peak memory": byte_size(gpu["peak_bytes"]),
            "GPU power": f"{gpu['power_w']:.0f} W" if gpu["power_w"] else gpu["power_why_not"],
        }
    return figures
