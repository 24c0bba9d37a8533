"""lmms-eval's side of quota: the model `quota`, the embedded benchmark as tasks, and retention reports over named
tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"


def manifest() -> Any:
    """What the entry point `lmms_eval.models` announces. lmms-eval calls it at every start, whatever model it runs:
    nothing heavy here."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="quota", chat_class_path="quota.lmms.model.Quota")
