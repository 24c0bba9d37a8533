"""What calibration finds at its output stays: refused before the work, damaged work computed again, a full disk said in
figures, files readable by all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quota.calib import run
from quota.calib.settings import Settings
from quota.calib.stream import Stream
from quota.calib.work import WorkFolder
from quota.core.errors import CheckpointError, UsageError
from tests.calib.calibration import float_folder, picture_samples

QUICK = Settings(steps=1, evaluate_every=1, batch=2, search_rows=32, held_out=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return float_folder(tmp_path_factory.mktemp("float") / "model")


def make(folder, out, **options):
    return run.calibrate(
        folder, picture_samples(2), out=out, progress=False, settings=QUICK, modules=("projector", "llm"), **options
    )


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
    real, calls = run._run_step, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(run, "_run_step", dies)
    with pytest.raises(KeyboardInterrupt):
        make(folder, tmp_path / "out")
    monkeypatch.setattr(run, "_run_step", real)
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


def work_of_two_steps(path):
    """A work folder with a stream and a block."""
    work = WorkFolder(path, {"seed": 0})
    work.commit({"float": Stream(work.stream_path("float"), 2, [3, 1], "float32", create=True)})
    work.notes["ids"], work.notes["shown"], work.notes["keep"] = [[1, 2]], [[("a", (1, 2))], [("b", None)]], [[0, 1]]
    work.save_block("a.b", {"a.b.w": torch.zeros(2)}, {"name": "a.b"})
    work.commit(work.streams)
    work.close()
    return path / "state.json"


@pytest.mark.parametrize(
    "field, value",
    [
        ("job", []),
        ("job", None),
        ("done", "2"),
        ("done", -1),
        ("done", 1.5),
        ("done", None),
        ("blocks", []),
        ("blocks", {"a.b": 3}),
        ("blocks", {"a.b": {"sha256": 3, "report": {}}}),
        ("blocks", {"../lock": {"sha256": "0" * 64, "report": {}}}),
        ("notes", 3),
        ("notes", {"ids": [["x"]]}),
        ("notes", {"more": 1}),
        ("streams", []),
        ("streams", {"other": {}}),
        ("streams", {"float": {}}),
        ("streams.float.file", "../../other"),
        ("streams.float.file", 3),
        ("streams.float.width", "2"),
        ("streams.float.width", 0),
        ("streams.float.lengths", 4),
        ("streams.float.lengths", [3, "1"]),
        ("streams.float.lengths", [3]),
        ("streams.float.dtype", "object"),
        ("streams.float.positions", ["x"] * 100_000),
        ("streams.float.positions", [2**40] * 4),
        ("streams.float.positions", [0, 1, [0, 0, 0], 2]),
        ("streams.float.roles", [0]),
        ("streams.float.grids", [[1]]),
        ("streams.float.images", [3, 1]),
        ("streams.float.sha256", None),
    ],
)
def test_a_forged_state_is_not_continued(tmp_path, capsys, field, value):
    """Its digest fits, its values do not: the field is named and the work begins again."""
    path = work_of_two_steps(tmp_path)
    state = json.loads(path.read_text().partition("\n")[2])
    *inside, last = field.split(".")
    part = state
    for name in inside:
        part = part[name]
    part[last] = value
    body = json.dumps(state)
    path.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
    work = WorkFolder(tmp_path, {"seed": 0})
    said = capsys.readouterr().err
    assert field.split(".")[-1] in said or last == "lengths"
    assert "starts again" in said and said.count("\n") == 1 and len(said) < 600
    assert (work.done, work.blocks, work.streams) == (0, {}, {})
    work.close()


@pytest.mark.parametrize("body", ["[]", "null", "{}", "[" * 100_000, "3"])
def test_a_signed_state_that_is_no_state(tmp_path, capsys, body):
    work_of_two_steps(tmp_path).write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
    work = WorkFolder(tmp_path, {"seed": 0})
    assert work.done == 0 and capsys.readouterr().err.count("\n") == 1
    work.close()


def test_an_intact_state_is_continued_with_what_it_says(tmp_path):
    work_of_two_steps(tmp_path)
    work = WorkFolder(tmp_path, {"seed": 0})
    assert work.done == 2 and list(work.blocks) == ["a.b"] and work.streams["float"].lengths == [3, 1]
    assert work.notes["ids"] == [[1, 2]] and work.notes["keep"] == [[0, 1]] and "grids" not in work.notes
    work.close()


def test_a_state_that_is_no_file_is_not_waited_for(tmp_path, capsys):
    path = work_of_two_steps(tmp_path)
    path.unlink()
    os.mkfifo(path)
    WorkFolder(tmp_path, {"seed": 0}).close()
    assert "not a regular file" in capsys.readouterr().err and path.is_file()


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
    given = {"progress": False, "method": "rtn"}
    run.calibrate(folder, None, out=tmp_path / "none", **given)
    run.calibrate(folder, picture_samples(2), out=tmp_path / "some", **given)
    assert (tmp_path / "none" / "model.safetensors").read_bytes() == (
        tmp_path / "some" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(UsageError, match="samples"):
        run.calibrate(folder, None, out=tmp_path / "gptq", progress=False, method="gptq")


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
