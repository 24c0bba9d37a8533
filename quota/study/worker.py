"""The measuring process of the runtime study: a job as JSON on stdin, figures as one line of JSON on stdout."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

_ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def peak_bytes() -> int:
    """Largest resident set of this process so far (Linux counts kilobytes, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def energy_uj() -> int | str:
    """Package energy counter in microjoules, or why there is none."""
    try:
        return int(_ENERGY.read_text())
    except (OSError, ValueError) as error:
        return f"not measured (no energy counter: {type(error).__name__})"


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    from dataclasses import asdict

    from quota.core.recipe import Recipe
    from quota.eval.generation import answers
    from quota.eval.gpu import measured
    from quota.runtime.load import Placement
    from quota.study.tasks import load_questions

    idle = peak_bytes()
    model, processor = Placement(*job["place"]).open(
        job["checkpoint"], Recipe.parse(job["recipe"]) if job["recipe"] else None
    )
    questions = load_questions(job["tasks"], job["questions"], model.config)
    answers(model, processor, questions[:1], job["max_new_tokens"])  # weights are packed at first use
    before, began, spent = energy_uj(), time.perf_counter(), time.process_time()
    with measured(model.device) as gpu:
        said = [answers(model, processor, [question], job["max_new_tokens"])[0] for question in questions]
    seconds, spent, after = time.perf_counter() - began, time.process_time() - spent, energy_uj()
    counted = isinstance(before, int) and isinstance(after, int)
    print(
        json.dumps(
            {
                "answers": said,
                "peak_bytes": peak_bytes(),
                "idle_bytes": idle,
                "cpu_ms_per_question": 1e3 * spent / len(questions),
                "power_w": (after - before) / 1e6 / seconds if counted and after >= before else None,  # type: ignore[operator]
                "power_why_not": None if counted else before,
                "gpu": gpu and asdict(gpu),
            }
        )
    )


if __name__ == "__main__":
    main()
