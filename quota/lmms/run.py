"""lmms-eval run in this process: task names and data checked first, failures as quota's own errors."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota.core.errors import QuotaError, UsageError
from quota.lmms import TASKS
from quota.lmms.scores import Benchmark, take_apart

INSTALL = "pip install -e '.[eval]' && pip install --no-deps lmms-eval==0.7.3"


def check_installed() -> None:
    """UsageError with the remedy where lmms-eval, or something it needs for images, is missing."""
    try:
        import lmms_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--tasks: lmms-eval cannot be imported ({error}); run `{INSTALL}` (with its dependencies it would bring a"
            " torchvision that breaks transformers)"
        ) from None


@dataclass(frozen=True)
class Plan:
    """What every row is asked. data: folder with local copies laid out as on the hub (`lmms-lab-encoder/POPE/...`).
    out: where tasks leave their files."""

    tasks: tuple[str, ...]
    out: Path
    data: Path | None = None
    limit: int | None = None


def find_tasks(names: Sequence[str]) -> Any:
    """A task manager that knows all of `names`; UsageError for a name that lmms-eval and this package do not have, with
    near ones."""
    check_installed()
    from lmms_eval.tasks import TaskManager

    with _quiet():
        manager = TaskManager("ERROR", include_path=str(TASKS), include_defaults=False, model_name="quota")
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager("ERROR", include_path=str(TASKS), model_name="quota")
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 4, 0.5)
            raise UsageError(
                f"--tasks: no task {name!r};"
                f" {'near ones: ' + ', '.join(near) if near else 'the embedded ones are quota_scenes and quota_pages'}"
            )
    if "mmbench_en_dev" in names and not os.environ.get("OPENAI_API_KEY"):
        raise UsageError(
            "task mmbench_en_dev: expected OPENAI_API_KEY, whose model reads answers that are no option's letter"
            " (without it lmms-eval draws a random letter); set it, or use mmbench_en_dev_static"
        )
    return manager


def run_tasks(model: Any, plan: Plan, manager: Any) -> dict[str, Benchmark]:
    """Leaf task -> outcome. `model`: a `quota.lmms.model.Quota`. UsageError when data is missing or lmms-eval fails;
    quota's own faults pass as they are."""
    from lmms_eval import evaluator
    from lmms_eval.tasks import get_task_dict

    plan.out.mkdir(parents=True, exist_ok=True)
    with _quiet(), _inside(plan.data), _truncated_images():
        tasks: dict[str, Any] = {}
        for name in plan.tasks:
            try:
                tasks.update(_leaves(get_task_dict([name], manager, "chat")))
            except Exception as error:  # datasets, the hub's client, pyarrow and the task's own code raise many kinds
                raise UsageError(
                    f"task {name}: its data cannot be opened ({reason(error)}); expected "
                    + (
                        f"a copy under {plan.data}"
                        if plan.data
                        else "a reachable hub with HF_TOKEN set, or local copies by --data"
                    )
                ) from error
        try:
            done = evaluator.simple_evaluate(
                model=model,
                tasks=list(tasks.values()),
                limit=plan.limit,
                bootstrap_iters=0,
                task_manager=manager,
                process_docs_parallel=1,
                verbosity="ERROR",
                cli_args=argparse.Namespace(output_path=str(plan.out), process_with_media=False),
            )
        except QuotaError:
            raise
        except Exception as error:
            if model.failure is not None:
                raise model.failure from None
            raise UsageError(
                f"lmms-eval failed on {', '.join(plan.tasks)}: {reason(error)}; QUOTA_TRACEBACK=1 shows where"
            ) from error
        return {
            name: take_apart(name, task, done["samples"][name], done["results"][name]) for name, task in tasks.items()
        }


def reason(error: BaseException) -> str:
    """The first line of what went wrong underneath: retries hide it."""
    attempt = getattr(error, "last_attempt", None)
    while attempt is not None and attempt.exception() is not None:
        error = attempt.exception()
        attempt = getattr(error, "last_attempt", None)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _leaves(tree: dict[Any, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out.update(_leaves(value) if isinstance(value, dict) else {str(key): value})
    return out


@contextlib.contextmanager
def _inside(data: Path | None) -> Iterator[None]:
    """Tasks name their data by hub name, which is a folder when it is one below the working folder; so local copies
    need no other name."""
    if data is None:
        yield
        return
    with contextlib.chdir(data):
        yield


@contextlib.contextmanager
def _truncated_images() -> Iterator[None]:
    """Some benchmarks hold truncated images, and lmms-eval reads them all the same."""
    from PIL import ImageFile

    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lmms-eval logs and prints; stdout belongs to the report."""
    from loguru import logger

    logger.disable("lmms_eval")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.enable("lmms_eval")
