"""Checkpoints put together from finished blocks are, byte for byte, what calibrating those parts writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from quota.calib import steps
from quota.calib.learn import learn_block
from quota.calib.parts import assemble
from quota.calib.run import calibrate
from quota.calib.settings import Settings
from quota.calib.stream import FloatSource
from quota.core.errors import CheckpointError
from quota.core.recipe import Recipe
from tests.calib.calibration import float_folder, mixed_samples, picture_samples, qwen_folder
from tests.prune.recipes import recipe_for


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_parts(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, samples = (
        (float_folder, picture_samples(3))
        if family == "llava"
        else (qwen_folder, mixed_samples(((32, 32), (24, 16), None)))
    )
    source = FloatSource(made(tmp_path / "float", layers=3))
    recipe = Recipe.parse({**pruned(tmp_path / "float"), "reference": "recorded" if family == "llava" else "per_image"})
    for name, options in {
        "whole": {},
        "some": {"settings": Settings(modules=("vision", "llm"), steps=1)},
        "pruned": {"recipe": recipe},
        "decoder": {"settings": Settings(modules=("llm",), steps=1), "recipe": recipe},
    }.items():
        given = {"settings": Settings(steps=1), **options}
        calibrate(tmp_path / "float", samples, out=tmp_path / name, progress=False, **given)
    whole, decoder = tmp_path / "whole", tmp_path / "decoder"
    assemble(source, {"vision": whole, "llm": whole}, tmp_path / "some-assembled")
    assert contents(tmp_path / "some-assembled") == contents(tmp_path / "some")
    assemble(source, {"vision": whole, "projector": whole, "llm": decoder}, tmp_path / "pruned-assembled")
    assert contents(tmp_path / "pruned-assembled") == contents(tmp_path / "pruned") != contents(whole)

    learned = []
    monkeypatch.setattr(
        steps, "learn_block", lambda block, *a, **k: learned.append(block.path) or learn_block(block, *a, **k)
    )
    options = {"settings": Settings(modules=("llm",), steps=1), "recipe": recipe, "progress": False}
    calibrate(tmp_path / "float", samples, out=tmp_path / "taken", unpruned=whole, **options)
    assert contents(tmp_path / "taken") == contents(decoder)
    assert learned == [source.family.decoder_layer(index) for index in (1, 2)]
    with pytest.raises(CheckpointError, match=r"the same calibration without a recipe, got another .recipe is"):
        calibrate(tmp_path / "float", samples, out=tmp_path / "none", unpruned=decoder, **options)
    file = next(whole.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=file.name):
        calibrate(tmp_path / "float", samples, out=tmp_path / "none", unpruned=whole, **options)
    assert not list(tmp_path.glob("none*"))


def pruned(folder: Path) -> dict:
    from quota.runtime.load import load_model

    return recipe_for(load_model(folder)[0], (1, 2), (0.5, 0.25)).model_dump()


def test_parts_of_another_model_are_refused(tmp_path: Path) -> None:
    float_folder(tmp_path / "float", layers=2)
    calibrate(
        tmp_path / "float",
        picture_samples(2),
        out=tmp_path / "llm",
        progress=False,
        settings=Settings(modules=("llm",), steps=0),
    )
    with pytest.raises(CheckpointError, match="expected quantized vision blocks"):
        assemble(FloatSource(tmp_path / "float"), {"vision": tmp_path / "llm"}, tmp_path / "out")
    other = FloatSource(float_folder(tmp_path / "other", layers=2, seed=1))
    with pytest.raises(CheckpointError, match="calibrate the parts from one float model"):
        assemble(other, {"llm": tmp_path / "llm"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
