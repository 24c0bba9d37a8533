"""Calibration on the fake device: results, what lies on it, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quota.calib import run
from quota.calib.settings import Settings
from quota.calib.speed import Speed
from quota.calib.stream import FloatSource
from tests.calib.calibration import float_folder, mixed_samples, picture_samples, qwen_folder
from tests.calib.test_run import recipe_for
from tests.device.fake import NAME, fake_device

QUICK = Settings(steps=0, batch=2, search_rows=64, held_out=1)
LEARNED = replace(QUICK, steps=2, evaluate_every=1)
ROUNDED = Settings(method="gptq", batch=2, search_rows=64, held_out=1)


@pytest.fixture(autouse=True)
def one_arithmetic(monkeypatch):
    """Attention of one formula on both devices, and no time spent on an estimate."""
    speed = Speed(products=1e10, element_s=1e-9, round_s=3e-8, search_s=4e-7, call_s=1e-3, byte_s=1e-9)
    monkeypatch.setattr("quota.calib.schedule.speed_of", lambda settings: speed)
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("float")
    return {
        "llava": float_folder(root / "llava", layers=2),
        "qwen2_5_vl": qwen_folder(root / "qwen", layers=2, key_bias=2.0),
    }


def samples_of(family):
    return picture_samples(3, text_only=1) if family == "llava" else mixed_samples(((32, 32), (24, 16), None))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "settings",
    [
        QUICK,
        replace(QUICK, inputs="mixed", text_share=0.3, relative=True, stream_dtype="float16"),
        ROUNDED,
        replace(ROUNDED, scheme="w4a16kv4"),
        replace(ROUNDED, method="awq"),
        replace(ROUNDED, method="rtn"),
    ],
    ids=["flatquant", "mixed", "gptq", "gptq-kv4", "awq", "rtn"],
)
def test_the_cpu_s_bytes(models, tmp_path, monkeypatch, family, settings):
    """The fake device has the CPU's arithmetic, so every byte is the CPU's; a tensor left on the wrong side raises."""
    given = {"samples": samples_of(family), "progress": False}
    run.calibrate(models[family], out=tmp_path / "cpu", settings=settings, **given)
    with fake_device(monkeypatch) as memory:
        run.calibrate(models[family], out=tmp_path / NAME, settings=replace(settings, device=NAME), **given)
    assert weights(tmp_path / NAME) == weights(tmp_path / "cpu")
    assert memory.peak and not memory.live


@pytest.mark.parametrize(("family", "inputs"), [("llava", "float"), ("qwen2_5_vl", "mixed")])
def test_learned_in_steps(models, tmp_path, monkeypatch, family, inputs):
    """The starts are equal. Gradients differ in their last bits, and AdamW's first steps go by a gradient's sign, so
    what is learned may take another way (docs/numerics.md: 15 %)."""
    settings, given = replace(LEARNED, inputs=inputs), {"samples": samples_of(family), "progress": False}
    report = run.calibrate(models[family], out=tmp_path / "cpu", settings=settings, **given)
    with fake_device(monkeypatch):
        other = run.calibrate(models[family], out=tmp_path / NAME, settings=replace(settings, device=NAME), **given)
    for here, there in zip(report.blocks, other.blocks, strict=True):
        # inputs="mixed": the quantized inputs come out of blocks that were learned
        assert [there[name] for name in ("mse_rtn", "mse_start")] == pytest.approx(
            [here[name] for name in ("mse_rtn", "mse_start")], rel=1e-3
        )
        assert there["mse"] == pytest.approx(here["mse"], rel=0.15)


def test_a_pruned_graph(models, tmp_path, monkeypatch):
    """The quota score and scores that the host computes choose the same tokens."""
    model = float_folder(tmp_path / "model")
    changes = {
        "method": "custom",
        "keep": [0.5, 0.25, 0.25],
        "candidates": [1, 2, 3],
        "final_keep": 0.25,
        "selections": [{"score": "quota"}, {"score": "random"}, {"score": "relevance", "policy": "dpp"}],
    }
    recipe = recipe_for(FloatSource(model), **changes)
    settings = replace(QUICK, modules=("llm",))
    given = {"samples": samples_of("llava"), "recipe": recipe, "progress": False}
    run.calibrate(model, out=tmp_path / "cpu", settings=settings, **given)
    with fake_device(monkeypatch):
        run.calibrate(model, out=tmp_path / NAME, settings=replace(settings, device=NAME), **given)
    assert weights(tmp_path / NAME) == weights(tmp_path / "cpu")


@pytest.mark.parametrize("settings", [LEARNED, ROUNDED], ids=["flatquant", "gptq"])
def test_the_device_holds_a_block_and_two_batches(models, tmp_path, monkeypatch, settings):
    """However many samples there are: nothing on the device grows with the streams."""
    peaks, planned = [], []
    for count in (4, 9):
        given = {"out": tmp_path / f"{count}", "settings": replace(settings, modules=("llm",), device=NAME)}
        with fake_device(monkeypatch) as memory:
            planned.append(run.plan_calibration(models["llava"], picture_samples(count), **given))
            run.calibrate(models["llava"], picture_samples(count), progress=False, **given)
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1] <= planned[0].device_memory == planned[1].device_memory, (peaks, planned)
    assert f"on {NAME} (an estimate)" in planned[0].lines()[2]


def test_the_device_refuses_what_a_gpu_refuses(monkeypatch):
    with fake_device(monkeypatch) as memory:
        x = torch.ones(4, 8).to(NAME)
        assert memory.live == 128 and x.device.type == NAME and (x + torch.tensor(1.0)).device.type == NAME
        for op, other in (
            (torch.add, torch.ones(8)),
            (torch.matmul, torch.ones(8, 2)),
            (torch.take, torch.tensor([0])),
        ):
            with pytest.raises(RuntimeError, match="of the CPU"):
                op(x, other)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        del x
        assert memory.live == 0
