"""Blocks of a small model learn side by side, each on one thread: neither the bytes nor what is kept of a killed or
failed run depends on how many there are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quota.calib import run, steps
from quota.calib.job import Job
from quota.calib.schedule import Schedule
from quota.calib.settings import Settings
from quota.calib.stream import FloatSource
from quota.calib.work import WorkFolder
from quota.core.errors import SampleError
from tests.calib.calibration import float_folder, killed, picture_samples
from tests.calib.test_run import recipe_for

QUICK = Settings(steps=3, evaluate_every=2, batch=2, search_rows=32, held_out=1)
LAYER = "model.language_model.layers."
Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_folder(tmp_path_factory.mktemp("float") / "model")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def calibrated(folder: Path, out: Path, progress: bool = False) -> Contents:
    run.calibrate(folder, picture_samples(4), out=out, settings=QUICK, progress=progress)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """What one thread makes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return calibrated(folder, tmp_path_factory.mktemp("alone") / "out")
    finally:
        torch.set_num_threads(before)


def instead(patch: pytest.MonkeyPatch, path: str, work: Callable[[Callable[[int], None]], None]) -> None:
    """Before a block learns, `work`, which is given its progress."""
    real = steps.learn_block

    def learn(block: Any, lesson: Any, settings: Settings, progress: Callable[[int], None]) -> Any:
        if block.path.startswith(path):
            work(progress)
        return real(block, lesson, settings, progress)

    patch.setattr(steps, "learn_block", learn)


def test_blocks_learn_at_once_and_change_no_bit(
    folder: Path,
    alone: Contents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: Callable[[int], None],
) -> None:
    """Two tower blocks meet in their calibrations, and two times two decoder blocks."""
    meet, inside, bars, real = threading.Barrier(2, timeout=120), list[int](), list[Any](), Schedule.bar

    def met(progress: Callable[[int], None]) -> None:
        meet.wait()
        inside.append(torch.get_num_threads())

    def watched(self: Schedule, *args: Any) -> Any:
        bars.append(real(self, *args))
        return bars[-1]

    monkeypatch.setattr(Schedule, "bar", watched)
    instead(monkeypatch, "model.vision_tower", met)
    instead(monkeypatch, LAYER, met)
    threads(2)
    assert calibrated(folder, tmp_path / "out", progress=True) == alone
    assert inside == [1] * 6 and torch.get_num_threads() == 2
    assert bars[0].n == pytest.approx(bars[0].total)


def test_more_threads_than_blocks(
    folder: Path, alone: Contents, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    threads(8)
    assert calibrated(folder, tmp_path / "out") == alone


@pytest.mark.parametrize("survived", [1, 4, 7])
def test_a_killed_run_goes_on_with_any_number_of_threads(
    folder: Path,
    alone: Contents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: Callable[[int], None],
    survived: int,
) -> None:
    threads(3)
    killed(monkeypatch, survived, lambda: calibrated(folder, tmp_path / "out"))
    threads(1)
    assert calibrated(folder, tmp_path / "out") == alone


def test_a_pruned_graph_with_any_number_of_threads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    """Tokens are chosen and dropped while the blocks before still learn; killed there, it chooses them again."""
    settings, recipe = replace(QUICK, steps=0, modules=("llm",)), recipe_for(FloatSource(folder))

    def made(out: str, count: int) -> Contents:
        threads(count)
        run.calibrate(folder, picture_samples(2), out=tmp_path / out, settings=settings, recipe=recipe, progress=False)
        return {path.name: path.read_bytes() for path in sorted((tmp_path / out).iterdir())}

    killed(monkeypatch, 8, lambda: made("many", 4))
    assert made("many", 4) == made("one", 1)


def test_a_block_that_fails_ends_the_others(
    folder: Path,
    alone: Contents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: Callable[[int], None],
) -> None:
    """The error is the block's own; what learns beside it ends at its next step, and the steps before are kept."""
    learning, ended = threading.Event(), list[str]()

    def fails(progress: Callable[[int], None]) -> None:
        assert learning.wait(120)
        raise SampleError("inputs are not finite")

    def goes_on(progress: Callable[[int], None]) -> None:
        learning.set()
        try:
            for _ in range(6000):
                progress(1)
                time.sleep(0.02)
        except BaseException as error:
            ended.append(type(error).__name__)
            raise

    threads(2)
    with monkeypatch.context() as patch, pytest.raises(SampleError, match="not finite"):
        instead(patch, f"{LAYER}1", fails)
        instead(patch, f"{LAYER}2", goes_on)
        calibrated(folder, tmp_path / "out")
    assert ended == ["Stopped"] and not (tmp_path / "out").exists()
    again = list[str]()
    instead(monkeypatch, "model", lambda _: again.append("block"))
    assert calibrated(folder, tmp_path / "out") == alone and len(again) == 3


def test_the_plan_counts_what_learns_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    """Disk as it is filled by three threads, the first of which is slow; memory and time of three blocks."""

    asked: dict[str, Any] = {"out": tmp_path / "out", "settings": replace(QUICK, steps=0)}

    def planned(count: int) -> Any:
        threads(count)
        return run.plan_calibration(folder, picture_samples(40), **asked)

    one, three = planned(1), planned(3)
    assert three.peak_memory > one.peak_memory and three.disk_needed > one.disk_needed
    most, commit = [0], WorkFolder.commit

    def committed(self: WorkFolder) -> None:
        most[0] = max(most[0], self.bytes())
        commit(self)

    monkeypatch.setattr(WorkFolder, "commit", committed)
    instead(monkeypatch, f"{LAYER}0", lambda _: time.sleep(0.5))
    run.calibrate(folder, picture_samples(40), progress=False, **asked)
    assert one.disk_needed < most[0] <= three.disk_needed


def test_which_blocks_have_a_thread_of_their_own(folder: Path, tmp_path: Path, threads: Callable[[int], None]) -> None:
    """Not those that wait for another's result, nor those off the CPU, nor where nothing learns."""
    threads(4)
    source = FloatSource(folder)

    def crew(samples: Any = None, **changes: Any) -> tuple[bool, int]:
        schedule = Schedule(Job(source, samples, tmp_path / "out", replace(QUICK, **changes)))
        return schedule.apart, schedule.crew

    assert crew(picture_samples(2)) == (True, 4) and crew(picture_samples(2), modules=("projector",)) == (True, 1)
    assert crew(picture_samples(2), inputs="quantized") == (False, 1)
    assert crew(picture_samples(2), device="cuda") == (False, 1)
    assert crew(method="rtn", steps=Settings.steps) == (False, 1)
