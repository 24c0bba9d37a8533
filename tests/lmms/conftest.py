"""Tiny checkpoints of both families and lmms-eval's task manager without its two thousand own tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageFile

from quota.lmms import TASKS
from quota.scenes import model as llava
from quota.scenes import qwen_model as qwen
from tests.one_thread import one_thread  # noqa: F401


@pytest.fixture(autouse=True)
def strict_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model made for lmms-eval's command sets Pillow for its whole process, which here goes on to other tests."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 visual tokens, 3 decoder layers, width 64."""
    root = tmp_path_factory.mktemp("llava")
    llava.build_model(llava.build_config(56, 64, 3)).save_pretrained(root)
    llava.build_processor(56).save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published picture geometry: patches of 14 px, merged by two, and the published limits; 2 decoder layers."""
    root = tmp_path_factory.mktemp("qwen")
    config = qwen.build_config(192, 2)
    config.vision_config.patch_size, config.vision_config.window_size, config.vision_config.depth = 14, 112, 2
    qwen.build_model(config).save_pretrained(root)
    processor = qwen.build_processor(14)
    processor.image_processor.size = {"shortest_edge": 4 * 28**2, "longest_edge": 16_384 * 28**2}
    processor.save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def manager() -> Any:
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR", include_path=str(TASKS), include_defaults=False, model_name="quota")


@pytest.fixture
def ask(manager: Any) -> Callable[..., dict[str, list[str]]]:
    """ask(model, tasks, limit) -> task -> texts, through lmms-eval's evaluator."""
    from lmms_eval import evaluator

    def asked(model: Any, tasks: list[str], limit: int) -> dict[str, list[str]]:
        done = evaluator.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            process_docs_parallel=1,
            verbosity="ERROR",
        )
        return {task: [sample["resps"][0][0] for sample in rows] for task, rows in done["samples"].items()}

    return asked
