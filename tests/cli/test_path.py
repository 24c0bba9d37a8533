"""The path through the command line on a tiny random model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.calls import fails, quota
from tests.cli.conftest import World


def test_calibrate_wrote_a_checkpoint_and_nothing_beside_it(world: World) -> None:
    assert (world.quantized / "quota.json").exists() and (world.quantized / "model.safetensors").exists()
    left = [p.name for p in world.root.iterdir() if "partial" in p.name or p.name.startswith(".")]
    assert left == []


def test_the_recipe_keeps_what_was_asked(world: World) -> None:
    facts = json.loads(quota("recipe", "explain", world.recipe, "--json").stdout)
    assert facts["candidates"] == [1, 2] and facts["final_tokens"] == 5
    assert quota("recipe", "validate", world.recipe, "--model", world.model).exit_code == 0
    assert quota("recipe", "validate", world.recipe, "--model", world.quantized).exit_code == 0


def test_run_says_the_same_twice_and_counts_tokens(world: World) -> None:
    asked = ("--image", world.picture, "--prompt", "what color is the star ?", "--max-new-tokens", "4", "--json")
    args = ("run", world.quantized, "--recipe", world.recipe, *asked)
    first, second = (json.loads(quota(*args).stdout) for _ in range(2))
    assert first["text"] == second["text"]
    assert first["visual_tokens"] == 16
    assert first["visual_tokens_by_layer"][0] == 16 and first["visual_tokens_by_layer"][-1] == 5
    plain = json.loads(
        quota(
            "run", world.quantized, "--image", world.picture, "--prompt", "what ?", "--max-new-tokens", "2", "--json"
        ).stdout
    )
    assert plain["visual_tokens_by_layer"] == [16, 16, 16] and plain["overlay"] is None


def test_eval_in_another_float_type_and_on_no_device(world: World, tmp_path: Path) -> None:
    asked = ("--samples", world.samples, "--out", tmp_path, "--json")
    whole, half = (
        json.loads(quota("eval", world.model, *asked, *more).stdout)["rows"][0]
        for more in ((), ("--dtype", "bfloat16"))
    )
    assert (whole["kv_dtype"], half["kv_dtype"]) == ("float32", "bfloat16") and half["kv_bytes"] * 2 == whole[
        "kv_bytes"
    ]
    assert len(list(tmp_path.glob("answers-*.jsonl"))) == 2  # answers of one float type are not taken for another's
    assert half["gpu_peak_bytes"] is None and half["gpu_power_w"] is None
    if not torch.cuda.is_available():
        fails(quota("eval", world.model, *asked, "--device", "cuda"), "device: cuda is not here")
        fails(
            quota(
                "study",
                "keep",
                "--model",
                world.model,
                "--samples",
                world.samples,
                "--out",
                tmp_path / "study",
                "--steps",
                "0",
                "-n",
                "6",
                "--device",
                "cuda",
            ),
            "device: cuda is not here",
        )


def test_eval_prints_tables(world: World) -> None:
    result = quota("eval", world.model, "--questions", "6", "--batch", "3")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "most frequent answer" in result.stdout and "counting" in result.stdout


def test_eval_of_several_recipes_says_what_it_does(world: World, tmp_path: Path) -> None:
    shutil.copyfile(world.recipe, tmp_path / "second.json")
    rows = ("--recipe", "none", "--recipe", world.recipe, "--recipe", tmp_path / "second.json")
    result = quota(
        "eval",
        world.quantized,
        *rows,
        "--model",
        world.model,
        "--samples",
        world.samples,
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert result.exit_code == 0, (result.output, result.exception)
    document = json.loads(result.stdout)
    assert [row["name"] for row in document["rows"]] == ["float", "quantized", "quantized+recipe", "quantized+second"]
    assert document["rows"][2]["accuracy"] == document["rows"][3]["accuracy"]
    assert all(len(row["prefill_ms_by_request"]) == document["timed_requests"] == 3 for row in document["rows"])
    assert set(document["seconds_by_stage"]) == {"opening", "answering", "timing"}
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == document
    for words in ("asking 3 questions", "timing 3 single requests per row"):
        assert words in result.stderr
    assert result.stderr.count("opening ") == 2, "the float model and the checkpoint that three rows share"
    fails(quota("eval", world.quantized, *rows, "--recipe", world.recipe, "--samples", world.samples), "given twice")
    shutil.copyfile(world.recipe, tmp_path / "recipe.json")
    fails(
        quota("eval", world.quantized, *rows, "--recipe", tmp_path / "recipe.json", "--samples", world.samples),
        "share a name",
    )


def test_one_and_two_threads_agree(world: World, tmp_path: Path) -> None:
    """Recipe bytes, kept tokens and greedy text do not depend on the number of threads."""
    seen, before = [], torch.get_num_threads()
    for threads in (1, 2):
        recipe = tmp_path / f"recipe-{threads}.json"
        made = ("recipe", world.quantized, "--model", world.model, "--samples", world.samples, "--layers", "1-2")
        asked = ("run", world.quantized, "--recipe", recipe, "--image", world.picture, "-p", "what color is the star ?")
        torch.set_num_threads(threads)
        try:
            results = [quota(*made, "--out", recipe), quota(*asked, "--max-new-tokens", "5", "--json")]
        finally:
            torch.set_num_threads(before)
        assert [result.exit_code for result in results] == [0, 0], results
        answer = json.loads(results[1].stdout)
        assert set(answer["kept"]) == {"1", "2"} and len(answer["kept"]["2"]) == 5
        seen.append((recipe.read_bytes(), answer["kept"], answer["text"]))
    assert seen[0] == seen[1]


# The command, killed inside its third step: a block is stored, the step that made it is not finished.
_KILLED = """
import os, signal
from quota.calib.work import WorkFolder
save_block = WorkFolder.save_block
def killed(work, path, tensors, report):
    save_block(work, path, tensors, report)
    if len(list((work.path / "blocks").iterdir())) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
WorkFolder.save_block = killed
from quota.cli.main import app
app()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_calibration_resumes_to_the_same_bytes(world: World, tmp_path: Path) -> None:
    out, partial = tmp_path / "q", tmp_path / "q.partial"
    arguments = [
        "calibrate",
        str(world.model),
        "--samples",
        str(world.samples),
        "--out",
        str(out),
        "--steps",
        "1",
        "--json",
    ]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert partial.exists() and not out.exists()
    done = quota(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    assert not partial.exists()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in world.quantized.iterdir()
    }


@pytest.mark.parametrize(
    "method", ["fastv", "pyramiddrop", "vtw", "divprune", "cdpruner", "random", "grid", "fitprune"]
)
def test_published_methods_from_the_command_line(world: World, tmp_path: Path, method: str) -> None:
    """Made for the quantized checkpoint, explained, and used by it; `fitprune` may not reach its default on three
    layers, so it is asked for more."""
    path = tmp_path / f"{method}.json"
    extra = ["--keep", "0.9"] if method == "fitprune" else []
    made = quota(
        "recipe", world.quantized, "--method", method, "--samples", world.samples, "--out", path, "--json", *extra
    )
    assert made.exit_code == 0, made.output
    recipe = json.loads(made.stdout)
    assert recipe["method"] == method and recipe["regime"] == "w4a4kv4" and recipe["provenance"]["samples"] == 3
    assert method in quota("recipe", "explain", path).stdout
    said = quota(
        "run",
        world.quantized,
        "--recipe",
        path,
        "--image",
        world.picture,
        "-p",
        "what is it ?",
        "--max-new-tokens",
        "2",
        "--json",
    )
    assert said.exit_code == 0, said.output
    assert list(json.loads(said.stdout)["kept"]) == [str(c) for c in recipe["candidates"]]
