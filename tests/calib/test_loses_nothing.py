"""What calibration finds at its output stays: refused before the work, damaged work computed again, a full disk said in
figures, files readable by all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from quota.calib import run
from quota.calib.settings import Settings
from quota.calib.stream import FloatSource
from quota.calib.work import STATE, WorkFolder
from quota.core.errors import CheckpointError, UsageError
from tests.calib.calibration import float_folder, killed, picture_samples, recipe_for

QUICK = Settings(modules=("projector", "llm"), steps=1, evaluate_every=1, batch=2, search_rows=32, held_out=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return float_folder(tmp_path_factory.mktemp("float") / "model")


def make(folder, out, seed=0, **options):
    settings = replace(QUICK, seed=seed)
    return run.calibrate(folder, picture_samples(2), out=out, progress=False, settings=settings, **options)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "quantized"
    make(folder, out)
    return out


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_the_users_is_refused_and_stays(folder, tmp_path, overwrite):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        make(folder, tmp_path / "mine", overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_a_finished_checkpoint_is_replaced_only_when_asked_and_alone(folder, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    make(folder, out)  # this very job: nothing to do
    assert contents(out) == contents(finished)
    with pytest.raises(UsageError, match="seed is 0 there, 7 here"):
        make(folder, out, seed=7)
    (out / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        make(folder, out, seed=7, overwrite=True)
    (out / "thesis.txt").unlink()
    assert contents(out) == contents(finished)
    make(folder, out, seed=7, overwrite=True)
    assert contents(out) != contents(finished) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_out_may_not_be_the_model_or_hold_it(folder, tmp_path, monkeypatch):
    before = contents(folder)
    monkeypatch.chdir(tmp_path)
    for out in (folder, folder.parent, ".", ".."):
        with pytest.raises(UsageError, match="expected a new folder"):
            make(folder, out)
    assert contents(folder) == before


@pytest.mark.parametrize("damage", ["block", "lost block", "stream", "[]", "null", '{"done": -3}'])
def test_damaged_work_is_computed_again(folder, finished, tmp_path, monkeypatch, capsys, damage):
    killed(monkeypatch, 7, lambda: make(folder, tmp_path / "out"))
    work = tmp_path / "out.partial"
    block, stream = min((work / "blocks").iterdir()), next(work.glob("float-*.bin"))
    if damage == "lost block":
        block.unlink()
    elif damage in ("block", "stream"):
        file = block if damage == "block" else stream
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    else:
        (work / "state.json").write_text(damage)
    make(folder, tmp_path / "out")
    assert "again" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(finished)


def forge(interrupted, folder, change):
    """The interrupted work with a state that vouches for itself; -> its out."""
    shutil.copytree(interrupted, folder / "at")
    file = folder / "at" / "out.partial" / STATE
    state = json.loads(file.read_text().partition("\n")[2])
    body = json.dumps(change(state) or state)
    file.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
    return folder / "at" / "out"


def changed(*path_and_value):
    *path, last, value = path_and_value

    def change(state):
        for name in path:
            state = state[name]
        state[last] = value

    return change


LAYER = "model.language_model.layers.0"
FORGERIES = {
    "a list": (lambda state: [state], "the whole"),
    "a word for a number": (changed("done", "seven"), "done: "),
    "a number less than none": (changed("done", -1), "done: "),
    "a truth for a number": (changed("done", True), "done: "),
    "a path out of the folder": (changed("streams", "float", "file", "../../victim-1.bin"), "streams.float.file: "),
    "a block's path out of the folder": (changed("blocks", "../../x", {"sha256": "0" * 64, "report": None}), "blocks."),
    "another stream": (changed("streams", "int8", {}), "streams.int8"),
    "words for lengths": (changed("streams", "float", "lengths", ["20", "20"]), "streams.float.lengths.0: "),
    "fewer rows": (changed("streams", "float", "columns", []), "columns: expected"),
    "words for places": (changed("streams", "float", "positions", ["x"] * 100_000), "streams.float.positions"),
    "both kinds of places": (changed("streams", "float", "positions", 0, [0, 0, 0]), "positions: expected"),
    "a float for a place": (changed("streams", "float", "positions", 0, 0.5), "streams.float.positions"),
    "a word for an error": (changed("blocks", LAYER, "report", "mse", "small"), f"blocks.{LAYER}.report.mse: "),
    "no digest": (changed("blocks", LAYER, "sha256", None), f"blocks.{LAYER}.sha256: "),
    "a list for a job": (changed("job", []), "job: "),
    "what no calibration has": (changed("notes", {}), "notes: "),
    "more steps than there are": (changed("done", 99), "done 99"),
    "no streams": (changed("streams", {}), r"streams \[\]"),
    "a block that is not there": (changed("blocks", {}), "0 blocks"),
}


@pytest.fixture(scope="module")
def interrupted(folder, tmp_path_factory):
    """Killed at step 8; -> the folder whose `out.partial` it left."""
    parent = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        killed(patch, 7, lambda: make(folder, parent / "out"))
    return parent


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_state_is_refused_in_one_line(folder, interrupted, tmp_path, name):
    change, words = FORGERIES[name]
    out = forge(interrupted, tmp_path, change)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=words) as refusal:
        make(folder, out)
    said = str(refusal.value).replace(str(tmp_path), "")
    assert "\n" not in said and "--fresh" in said and len(said) < 600
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["a list", "more steps than there are"])
def test_a_forged_state_is_discarded_when_asked(folder, finished, interrupted, tmp_path, name):
    out = forge(interrupted, tmp_path, FORGERIES[name][0])
    make(folder, out, resume=False)
    assert contents(out) == contents(finished)


@pytest.mark.parametrize("survived", [1, 6, 7, 8, 10])
def test_resumes_on_a_pruned_graph(folder, pruned, tmp_path, monkeypatch, survived):
    """Between a choice and its drop included: the marks travel with the streams. Blocks learn from quantized inputs, so
    there are two."""
    recipe, settings, whole = pruned

    def calibrate():
        run.calibrate(
            folder, picture_samples(2), out=tmp_path / "out", progress=False, settings=settings, recipe=recipe
        )

    killed(monkeypatch, survived, calibrate)
    calibrate()
    assert contents(tmp_path / "out") == contents(whole)


@pytest.fixture(scope="module")
def pruned(folder, tmp_path_factory):
    recipe, settings = recipe_for(FloatSource(folder)), replace(QUICK, steps=0, inputs="quantized")
    out = tmp_path_factory.mktemp("pruned") / "out"
    run.calibrate(folder, picture_samples(2), out=out, progress=False, settings=settings, recipe=recipe)
    return recipe, settings, out


@pytest.mark.parametrize("body", ["[]", "null", "{}", "[" * 100_000, "3"])
def test_a_signed_state_that_is_no_state(tmp_path, body):
    (tmp_path / STATE).write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
    with pytest.raises(CheckpointError, match="--fresh") as refusal:
        WorkFolder(tmp_path, {"seed": 0})
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600
    assert WorkFolder(tmp_path, {"seed": 0}, resume=False).done == 0


def test_a_state_that_is_no_file_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / STATE)
    WorkFolder(tmp_path, {"seed": 0}).close()
    assert "not a regular file" in capsys.readouterr().err and (tmp_path / STATE).is_file()


def test_a_full_disk_is_said_before_the_work(folder, tmp_path, monkeypatch):
    real = os.statvfs

    def full(path):
        found = list(real(path))
        found[4] = 10  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", full)
    with pytest.raises(UsageError, match=r"needs about \d+ bytes on the disk, \d+ are free"):
        make(folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_files_have_the_umasks_mode(finished):
    mask = os.umask(0o022)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in finished.iterdir()} == {0o666 & ~mask}


def test_rounding_needs_no_samples(folder, tmp_path):
    given = {"progress": False, "settings": Settings(method="rtn")}
    run.calibrate(folder, None, out=tmp_path / "none", **given)
    run.calibrate(folder, picture_samples(2), out=tmp_path / "some", **given)
    assert (tmp_path / "none" / "model.safetensors").read_bytes() == (
        tmp_path / "some" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(UsageError, match="samples"):
        run.calibrate(folder, None, out=tmp_path / "gptq", progress=False, settings=Settings(method="gptq"))


def test_a_lacking_tensor_is_named_before_the_work(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.3.mlp.down_proj.weight"))
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != name},
        tmp_path / "model" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.down_proj\.weight"):
        make(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
