"""Bad input that only a loaded model can find is one line, and nothing is lost or half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.calls import fails, quota
from tests.cli.conftest import World, make_float


def test_a_recipe_for_another_model(world: World, tmp_path: Path) -> None:
    other = make_float(tmp_path / "other", seed=1)
    fails(quota("run", other, "--recipe", world.recipe, "--prompt", "what ?"), "fingerprint")
    fails(quota("eval", other, "--recipe", world.recipe, "--samples", world.samples), "fingerprint")
    result = quota("recipe", "validate", world.recipe, "--model", other)
    assert result.exit_code == 1 and "fingerprint" in result.stderr


@pytest.mark.parametrize(("field", "value"), [("architecture", "Foo"), ("layers", 4)])
def test_what_loading_refuses_is_not_called_valid(world: World, tmp_path: Path, field: str, value: Any) -> None:
    """Not the fingerprint alone."""
    data = json.loads(world.recipe.read_text())
    data["model"][field] = value
    (tmp_path / "edited.json").write_text(json.dumps(data))
    assert quota("recipe", "validate", tmp_path / "edited.json").exit_code == 0
    result = quota("recipe", "validate", tmp_path / "edited.json", world.recipe, "--model", world.quantized)
    assert result.exit_code == 1 and f"model.{field}" in result.stderr and str(world.recipe) in result.stdout
    fails(quota("run", world.quantized, "--recipe", tmp_path / "edited.json", "--prompt", "what ?"), f"model.{field}")


def test_truncated_and_tampered_weights(world: World, tmp_path: Path) -> None:
    for name in ("cut", "flipped"):
        shutil.copytree(world.quantized, tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        data = bytearray(weights.read_bytes())
        if name == "cut":
            data = data[: len(data) // 2]
        else:
            data[-100] ^= 1
        weights.write_bytes(bytes(data))
        fails(quota("run", tmp_path / name, "--prompt", "what ?"), "model.safetensors")
    shutil.copytree(world.model, tmp_path / "float")
    weights = tmp_path / "float" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    fails(quota("run", tmp_path / "float", "--prompt", "what ?"), "float")
    fails(
        quota("calibrate", tmp_path / "float", "--samples", world.samples, "--out", tmp_path / "q", "--steps", "1"),
        "model.safetensors",
    )
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"schema": "quota-samples/1", "samples": []}, ("at least one",)),
        (
            {"schema": "quota-samples/1", "samples": [{"id": "s9", "image": "missing.png", "instruction": "?"}]},
            ("s9", "missing.png"),
        ),
        ({"schema": "quota-samples/1", "samples": [{"id": "s9", "image": "corrupt.png", "instruction": "?"}]}, ("s9",)),
        ([], ("schema",)),
    ],
)
def test_bad_samples(world: World, tmp_path: Path, document: Any, words: tuple[str, ...]) -> None:
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    samples = tmp_path / "samples.json"
    samples.write_text(json.dumps(document))
    fails(quota("calibrate", world.model, "--samples", samples, "--out", tmp_path / "q"), *words)
    fails(quota("eval", world.model, "--samples", samples), *words)
    samples.write_text("")
    fails(quota("calibrate", world.model, "--samples", samples, "--out", tmp_path / "q"), "samples.json")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("picture", [False, True])
def test_the_mark_of_a_picture_in_a_prompt(world: World, picture: bool) -> None:
    image = ("--image", world.picture) if picture else ()
    fails(quota("run", world.quantized, "--prompt", "what is <image> ?", *image), "prompt: must not contain <image>")
    fails(quota("run", world.quantized, "--prompt", "what \udcff ?", *image), "prompt: expected Unicode text")


def test_the_mark_of_a_picture_in_a_sample(world: World, tmp_path: Path) -> None:
    samples = tmp_path / "samples.json"
    rows = json.loads(world.samples.read_text())["samples"]
    for row in rows:
        row["image"] = str(world.root / row["image"])
    rows[-1]["instruction"] = "what is <image> ?"
    samples.write_text(json.dumps({"schema": "quota-samples/1", "samples": rows}))
    said = (f"sample '{rows[-1]['id']}'", "instruction", "<image>")
    began = ("--samples", samples, "--out")
    fails(quota("calibrate", world.model, *began, tmp_path / "q", "--steps", "0"), *said)
    assert not (tmp_path / "q.partial").exists()  # found before the work
    fails(quota("recipe", world.quantized, "--model", world.model, *began, tmp_path / "r.json"), *said)
    fails(quota("recipe", world.quantized, "--method", "fastv", *began, tmp_path / "r.json"), *said)
    result = quota("eval", world.quantized, "--samples", samples)
    assert result.exit_code == 1 and all(word in result.stderr.splitlines()[-1] for word in said)


def test_run_refuses_a_prompt_beyond_the_model_and_stops_at_its_end(world: World) -> None:
    fails(
        quota("run", world.quantized, "--prompt", "what " * 4200),
        "tokens leave no room for an answer; the limit is 4096 together",
    )
    prompt = "what " * (4096 - 6)
    whole = quota("run", world.quantized, "--prompt", prompt, "--max-new-tokens", "200", "--json")
    figures = json.loads(whole.stdout)
    assert figures["prompt_tokens"] + figures["new_tokens"] <= 4096


def test_eval_needs_answers(world: World, tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(
        json.dumps({"schema": "quota-samples/1", "samples": [{"id": "s1", "instruction": "?"}]})
    )
    fails(quota("eval", world.model, "--samples", tmp_path / "samples.json"), "s1", "answer")


def test_a_failed_calibration_leaves_the_good_checkpoint(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.quantized, tmp_path / "q")
    before = {p.name: p.read_bytes() for p in (tmp_path / "q").iterdir()}
    (tmp_path / "empty.json").write_text('{"schema": "quota-samples/1", "samples": []}')
    fails(
        quota("calibrate", world.model, "--samples", tmp_path / "empty.json", "--out", tmp_path / "q"), "at least one"
    )
    assert {p.name: p.read_bytes() for p in (tmp_path / "q").iterdir()} == before


_BOTH = """
import json, sys
from quota.cli.main import app
for args in json.loads(sys.argv[1]):
    try:
        app(args)
    except SystemExit as left:
        print(left.code)
"""


def test_a_hub_name_out_of_reach_is_one_line(world: World, tmp_path: Path) -> None:
    """Whether the hub may be asked is read when its library is imported: one process for both commands."""
    commands = (
        ["run", "nobody/nothing", "-p", "x"],
        ["calibrate", "nobody/nothing", "--samples", str(world.samples), "--out", str(tmp_path / "q")],
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _BOTH, json.dumps(commands)], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.split() == ["1", "1"] and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all("nobody/nothing" in line for line in errors)
