"""The plan of a calibration against a run: what it writes and holds, and how its steps weigh. Nothing here depends on
how quick the machine is."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quota.calib import plan as plans
from quota.calib import run, speed
from quota.calib.job import Job
from quota.calib.plan import block_seconds
from quota.calib.schedule import Schedule
from quota.calib.settings import METHODS, Settings
from quota.calib.speed import Speed, measured_speed
from quota.calib.stream import FloatSource
from quota.calib.work import WorkFolder
from quota.core.threads import one_thread
from tests.calib.calibration import float_folder, mixed_samples, picture_samples, qwen_folder

QUICK = Settings(steps=2, evaluate_every=1, batch=2, search_rows=32, held_out=1)
SPEED = Speed(products=1e10, element_s=1e-9, round_s=3e-8, search_s=4e-7, call_s=1e-3, byte_s=1e-9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return float_folder(tmp_path_factory.mktemp("float") / "model")


def on_disk(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("method", "kind"), [("flatquant", "llava"), ("gptq", "llava"), ("rtn", "llava"), ("flatquant", "qwen")]
)
def test_the_disk_figure_is_what_a_run_writes(folder, tmp_path, monkeypatch, method, kind):
    """At the fullest moment: seen at the end of every step with its old streams, and before the old folder is
    removed."""
    model = folder if kind == "llava" else qwen_folder(tmp_path / "model")
    samples = picture_samples(24) if kind == "llava" else mixed_samples(((40, 40), (64, 32), (32, 64)) * 6)
    steps = {"steps": 0} if method == "flatquant" else {"steps": Settings.steps}
    given = {"out": tmp_path / "out" / "q", "settings": replace(QUICK, method=method, **steps)}
    (tmp_path / "out").mkdir()
    seen = [0]
    commit, remove = WorkFolder.commit, WorkFolder.remove

    def watched(real):
        def call(self, *args):
            seen[0] = max(seen[0], on_disk(tmp_path / "out"))
            return real(self, *args)

        return call

    monkeypatch.setattr(WorkFolder, "commit", watched(commit))
    monkeypatch.setattr(WorkFolder, "remove", watched(remove))
    with one_thread():  # others may not be as far behind as they are counted
        planned = run.plan_calibration(model, samples, **given)
        assert not list((tmp_path / "out").iterdir())
        run.calibrate(model, samples, progress=False, **given)
    assert seen[0] <= planned.disk_needed <= 1.25 * seen[0] + 2**18, (seen[0], planned.disk_needed)  # small files


def test_figures_and_words(folder, tmp_path):
    samples = picture_samples(2)
    plan = run.plan_calibration(
        folder, samples, out=tmp_path / "out", settings=replace(QUICK, modules=("projector", "llm"))
    )
    assert (plan.samples, plan.images, plan.blocks, plan.blocks_all) == (2, 2, 5, 7) and plan.tokens > 2 * 16
    assert plan.disk_free > 0 and plan.seconds > 0 and not list(tmp_path.iterdir())
    said = plan.lines()
    assert "estimate" in said[2] and "estimate" in said[4] and json.dumps(plan.to_dict())


_MEASURED = """
import resource, sys
from quota.calib import run
from quota.calib.settings import Settings
from tests.calib.calibration import picture_samples
settings = Settings(modules=("llm",), steps=2, evaluate_every=1, batch=4, search_rows=64, held_out=1)
planned = run.plan_calibration(sys.argv[1], picture_samples(8), out=sys.argv[2], settings=settings)
run.calibrate(sys.argv[1], picture_samples(8), out=sys.argv[2], settings=settings, progress=False)
print(planned.peak_memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_the_memory_figure_is_an_upper_bound(folder, tmp_path):
    """In a process of its own, whose peak is the run's."""
    command = [sys.executable, "-c", _MEASURED, str(folder), str(tmp_path / "out")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    planned, measured = map(
        int, subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split()
    )
    assert measured <= planned <= 2 * measured, (planned, measured)


def weights(schedule: Schedule) -> dict[str, float]:
    return {step.path: sum(step.seconds(schedule.job, SPEED)) for step in schedule.steps}


def schedule_of(folder, tmp_path, samples, **changes) -> Schedule:
    return Schedule(Job(FloatSource(folder), samples, tmp_path / "out", replace(QUICK, **changes)))


def test_steps_weigh_what_they_take(folder, tmp_path):
    """By the work in them, at one fixed speed: more samples, steps, tokens or parameters weigh more, a float block far
    less than one that learns."""
    few, many = picture_samples(4), picture_samples(12)
    base, more = weights(schedule_of(folder, tmp_path, few)), weights(schedule_of(folder, tmp_path, many))
    longer = weights(schedule_of(folder, tmp_path, few, steps=40))
    part = weights(schedule_of(folder, tmp_path, few, modules=("llm",), steps=40))
    layers = [f"model.language_model.layers.{index}" for index in range(4)]
    tower = [f"model.vision_tower.encoder.layers.{index}" for index in range(2)]
    assert len({base[path] for path in layers}) == 1, "equal blocks weigh the same"
    for path in (*layers, *tower, "model.multi_modal_projector"):
        assert base[path] < more[path] and 5 * base[path] < longer[path]
    assert base[layers[0]] > base[tower[0]] > base["model.multi_modal_projector"], (
        "wider blocks and longer items weigh more"
    )
    assert all(part[path] < 0.1 * longer[path] for path in tower) and all(part[path] == longer[path] for path in layers)
    for method in ("gptq", "awq", "rtn"):
        fixed = {"steps": Settings.steps}
        assert (
            weights(schedule_of(folder, tmp_path, few, method=method, **fixed))[layers[0]]
            < weights(schedule_of(folder, tmp_path, few, **fixed))[layers[0]]
        )


def test_the_bar_moves_by_the_weights_and_ends_full(folder, tmp_path, monkeypatch, capsys):
    """What is left is told from the work that is left: after every step the bar stands where the weights of the steps
    so far end."""
    monkeypatch.setattr("quota.calib.schedule.speed_of", lambda settings: SPEED)
    real, bars, stood = Schedule.bar, [], []
    commit = WorkFolder.commit

    def watched(self, *args):
        bars.append(real(self, *args))
        return bars[-1]

    def committed(self):
        commit(self)
        stood.append((bars[-1].n, bars[-1].total))

    monkeypatch.setattr(Schedule, "bar", watched)
    monkeypatch.setattr(WorkFolder, "commit", committed)
    samples = picture_samples(4)
    schedule = schedule_of(folder, tmp_path, samples)
    with one_thread():  # else blocks side by side move it together
        run.calibrate(folder, samples, out=tmp_path / "out", settings=QUICK, progress=True)
    sums = [sum(map(sum, schedule.seconds[: done + 1])) for done in range(len(schedule.steps))]
    assert [n for n, _ in stood] == pytest.approx(sums) and [total for _, total in stood] == pytest.approx(
        [sums[-1]] * len(sums)
    )
    assert sums[0] < 0.01 * sums[-1] and max(b - a for a, b in itertools.pairwise(sums)) < 0.3 * sums[-1]
    assert stood[-1][0] <= stood[-1][1] and "estimate" in capsys.readouterr().err


def test_the_speed_is_measured_here(monkeypatch):
    """The clock alone decides: a machine ten times as slow is estimated to take ten times as long."""
    found = []
    for factor in (1.0, 10.0):
        now = [0.0]

        def clock(now: list[float] = now, factor: float = factor) -> float:
            now[0] += 0.05 * factor
            return now[0]

        monkeypatch.setattr(speed.time, "perf_counter", clock)
        before = torch.random.get_rng_state()
        found.append(measured_speed(Settings()))
        assert torch.equal(before, torch.random.get_rng_state()), "a plan draws no random numbers"
    assert found[0].products == pytest.approx(10 * found[1].products) and found[1].call_s == pytest.approx(
        10 * found[0].call_s
    )
    assert found[1].round_s == pytest.approx(10 * found[0].round_s) and found[1].element_s == pytest.approx(
        10 * found[0].element_s
    )


def test_no_block_without_items_costs_a_pass():
    size = plans.BlockSize(((64, 64),), 64 * 64, 64, 2)
    assert block_seconds(size, [], None, QUICK, SPEED) == (0.0, 0.0)
    assert block_seconds(size, [], METHODS["rtn"], QUICK, SPEED)[1] > 0
