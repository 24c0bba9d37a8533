"""Where a study's questions come from: one list of questions, whatever the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quota.core.errors import UsageError
from quota.demo.embedded import held_out
from quota.eval.questions import Question, sample_questions

SCENES = "scenes"


def load_questions(tasks: str, number: int, config: Any) -> list[Question]:
    """tasks: "scenes", `number` held-out generated questions that suit a model of `config` (five kinds of pages where
    resolution is dynamic); or a samples file with answers, of which the first `number` are asked. UsageError for
    anything else."""
    if tasks == SCENES:
        return held_out(number, config)
    path = Path(tasks)
    if path.suffix != ".json" or not path.is_file():
        raise UsageError(f"--tasks: expected {SCENES!r} or a samples file (.json) with answers, got {tasks!r}")
    from quota.calib.samples import Samples

    return sample_questions(Samples.load(path))[:number]
