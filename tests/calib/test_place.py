"""Device and dtype of a calibration without a GPU: products in 16 bits, what a job remembers, plans on paper."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from benchmarks.model.archs import llava_7b
from quota.calib import run
from quota.calib.settings import Settings
from quota.calib.speed import sheet_speed
from quota.cli.main import app
from quota.core import devices
from quota.core.errors import CheckpointError, UsageError
from quota.scenes.model import build_processor
from tests.calib.calibration import float_folder, killed, picture_samples, qwen_folder

QUICK = Settings(steps=4, evaluate_every=2, batch=2, search_rows=64, held_out=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("float")
    return {
        "llava": float_folder(root / "llava", layers=2),
        "qwen2_5_vl": qwen_folder(root / "qwen", layers=2, key_bias=2.0),
    }


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(("family", "dtype"), [("llava", "bfloat16"), ("qwen2_5_vl", "float16")])
def test_products_in_16_bits_leave_the_errors(models, tmp_path, family, dtype):
    """docs/numerics.md: within 25 % of float32's; what float32 itself differs by where learning takes another way."""
    errors = []
    for each in ("float32", dtype):
        settings = replace(QUICK, dtype=each)
        report = run.calibrate(
            models[family], picture_samples(4), out=tmp_path / each, settings=settings, progress=False
        )
        errors.append([(block["name"], block["mse"]) for block in report.blocks])
    assert errors[0] != errors[1]
    for (name, exact), (_, low) in zip(*errors, strict=True):
        assert low == pytest.approx(exact, rel=0.25), name


def test_a_job_goes_on_where_it_was_begun(models, tmp_path, monkeypatch):
    given = {"out": tmp_path / "out", "progress": False}
    begun = replace(QUICK, modules=("llm",), steps=0)
    killed(monkeypatch, 7, lambda: run.calibrate(models["llava"], picture_samples(2), settings=begun, **given))
    with pytest.raises(UsageError, match=r"settings\.device is 'cpu' there, 'cpu bfloat16' here"):
        run.calibrate(models["llava"], picture_samples(2), settings=replace(begun, dtype="bfloat16"), **given)
    report = run.calibrate(models["llava"], picture_samples(2), settings=begun, **given)
    assert report.settings["device"] == "cpu" and "dtype" not in report.settings, (
        "a manifest of the default says no more"
    )


def test_places():
    assert Settings(device="cuda:1").place == "cuda" and Settings(dtype="float16").place == "cpu float16"
    with pytest.raises(UsageError, match="dtype: expected one of float32, float16, bfloat16, got 'int8'"):
        Settings(dtype="int8")


@pytest.mark.usefixtures("no_gpu")
def test_a_device_that_is_not_here_is_refused_before_the_work(models, tmp_path):
    for device, words in (
        ("cuda", "cuda is not here"),
        ("tpu", "expected cpu, cuda or cuda:N"),
        ("mps", "expected cpu"),
    ):
        with pytest.raises(UsageError, match=f"device: .*{words}"):
            run.calibrate(models["llava"], None, out=tmp_path / "out", settings=Settings(method="rtn", device=device))
        command = [
            "recipe",
            str(models["llava"]),
            "--method",
            "fastv",
            "--out",
            str(tmp_path / "r"),
            "--device",
            device,
        ]
        samples = tmp_path / "samples.json"
        samples.write_text("{}")
        said = CliRunner().invoke(app, [*command, "--samples", str(samples)])
        assert said.exit_code == 1 and words in said.output
    assert {path.name for path in tmp_path.iterdir()} == {"samples.json"}


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    """LLaVA-1.5-7B's configuration beside a processor, without weights."""
    folder, processor = tmp_path_factory.mktemp("7b"), build_processor(336)
    config = llava_7b()
    config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("no_gpu")
def test_seven_billion_on_paper(seven_billion, tmp_path):
    """Without weights and without a GPU: under half an hour by an H200's data sheet, the device's memory told apart."""
    minutes = {}
    for dtype in ("float32", "bfloat16"):
        settings = Settings(device="cuda", dtype=dtype)
        plan = run.plan_calibration(seven_billion, picture_samples(128), out=tmp_path / "out", settings=settings)
        minutes[dtype] = plan.seconds / 60
        assert plan.blocks == 56 and plan.tokens > 128 * 576 and 4e9 < plan.device_memory < 20e9 < 141e9
        assert "on cuda (an estimate)" in plan.lines()[2] and "data sheet of an NVIDIA H200" in plan.lines()[4]
    assert 2 < minutes["bfloat16"] < minutes["float32"] < 30
    with pytest.raises(CheckpointError, match="safetensors"):
        run.calibrate(seven_billion, picture_samples(1), out=tmp_path / "out", settings=Settings())


def test_a_sheet_is_no_measurement():
    assert (
        "data sheet" in sheet_speed("float16").by and sheet_speed("float16").products > sheet_speed("float32").products
    )
