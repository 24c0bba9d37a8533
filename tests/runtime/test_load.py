from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quota.core.checkpoint import Manifest, save_checkpoint
from quota.core.errors import CheckpointError, RecipeError, UsageError
from quota.core.files import sha256_file
from quota.core.formats import DEFAULT
from quota.models import model_fingerprint
from quota.models.quantize import quantized_modules
from quota.models.rtn import quantize_rtn
from quota.runtime.load import load
from tests.prune.recipes import greedy, recipe_for
from tests.tiny import llava_inputs, tiny_llava

ALL = ("vision", "projector", "llm")


def save(folder, modules=ALL, max_shard_bytes=2**30, **options):
    model = tiny_llava()
    fingerprint = model_fingerprint(model)
    quantize_rtn(model, modules, **options)
    save_checkpoint(model, folder, Manifest(DEFAULT, tuple(modules), fingerprint), max_shard_bytes=max_shard_bytes)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "quantized"
    return folder, save(folder, max_shard_bytes=60_000)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def resign(folder) -> None:
    """Make the manifest agree with the files again, as someone who edits both would."""
    data = json.loads((folder / "quota.json").read_text())
    names = sorted(p.name for p in folder.iterdir() if p.name != "quota.json")
    data["files"] = {n: sha256_file(folder / n) for n in names}
    data["bytes"] = {n: (folder / n).stat().st_size for n in names}
    (folder / "quota.json").write_text(json.dumps(data))


def shard_with(folder, tensor: str):
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if tensor in file.keys():  # noqa: SIM118
                return path
    raise AssertionError(tensor)


@pytest.mark.parametrize("modules", [ALL, ("llm",), ("vision", "llm"), ("projector",)])
@pytest.mark.parametrize("transforms", [True, False])
def test_round_trip_is_bit_equal(tmp_path, modules, transforms):
    model = save(tmp_path / "out", modules, transforms=transforms)
    loaded, inputs = load(tmp_path / "out"), llava_inputs(model)
    assert quantized_modules(loaded) == modules and loaded.processor is None and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert torch.equal(greedy(loaded, inputs).sequences, greedy(model, inputs).sequences)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


def test_sharded_checkpoint_equals_a_single_file(saved, tmp_path):
    folder, model = saved
    assert len(list(folder.glob("*.safetensors"))) > 3
    save(tmp_path / "one")
    one, many, inputs = load(tmp_path / "one"), load(folder), llava_inputs(model)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), many.state_dict().values(), strict=True))
    assert torch.equal(greedy(one, inputs).sequences, greedy(many, inputs).sequences)


def test_saving_what_was_loaded_gives_the_same_bytes(saved, tmp_path):
    folder, _ = saved
    model = load(folder)
    again = save_checkpoint(
        model, tmp_path / "again", Manifest(DEFAULT, ALL, model_fingerprint(model)), max_shard_bytes=60_000
    )
    first = Manifest.load(folder)
    assert {n: h for n, h in again.files.items() if "safetensors" in n} == {
        n: h for n, h in first.files.items() if "safetensors" in n
    }


def test_dtype(saved):
    folder, _ = saved
    low = load(folder, dtype=torch.bfloat16)
    assert (
        low.lm_head.weight.dtype == torch.bfloat16
        and low.model.language_model.layers[0].mlp.down_proj.w_scale.dtype == torch.float32
    )
    inputs = llava_inputs(low)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert greedy(low, inputs).sequences.shape[1] == inputs["input_ids"].shape[1] + 5
    with pytest.raises(CheckpointError, match="dtype"):
        load(folder, dtype=torch.int8)


def test_recipe_is_installed(saved, tmp_path):
    folder, model = saved
    recipe = recipe_for(model)
    recipe.save(tmp_path / "recipe.json")
    loaded, inputs = load(folder, recipe=tmp_path / "recipe.json"), llava_inputs(model)
    greedy(loaded, inputs)
    assert loaded.quota_handle.cache_lengths == [30, 26, 22, 18]
    loaded.quota_handle.undo()
    assert torch.equal(greedy(loaded, inputs).sequences, greedy(model, inputs).sequences)
    with pytest.raises(RecipeError, match="fingerprint"):
        load(folder, recipe=recipe_for(tiny_llava(seed=5)))


def test_float_checkpoint(tmp_path):
    model = tiny_llava()
    model.save_pretrained(tmp_path / "float")
    loaded, inputs = load(tmp_path / "float"), llava_inputs(model)
    assert quantized_modules(loaded) == ()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_missing_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "nothing-here")


def test_truncated_altered_and_missing_files(folder):
    path = shard_with(folder, "lm_head.weight")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load(folder)
    with pytest.raises(CheckpointError, match="safetensors"):
        load(folder, verify=False)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="altered"):
        load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load(folder)
    path.write_bytes(data)
    load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


def test_missing_manifest(folder):
    (folder / "quota.json").unlink()
    with pytest.raises(CheckpointError, match="manifest"):
        load(folder)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("model.language_model.layers.1.mlp.down_proj.w_q", lambda t: t[:-1].clone(), "down_proj.w_q: expected shape"),
        ("model.language_model.layers.1.mlp.down_proj.w_q", lambda t: t.float(), "down_proj.w_q: expected torch.uint8"),
        ("model.language_model.layers.1.mlp.down_proj.w_scale", lambda t: t.half(), "w_scale: expected torch.float32"),
        (
            "model.language_model.layers.1.mlp.down_proj.left",
            lambda t: t[:, :-1].contiguous(),
            "left: expected a square",
        ),
        ("model.language_model.layers.1.mlp.down_proj.w_scale", None, "w_scale: missing"),
        ("lm_head.weight", None, "lm_head.weight: missing"),
        ("model.language_model.embed_tokens.weight", lambda t: -t, "source_fingerprint"),
    ],
)
def test_tensors_that_do_not_fit(folder, name, change, message):
    path = shard_with(folder, name)
    tensors = load_file(path)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    resign(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_unknown_tensor(folder):
    save_file({"surprise": torch.zeros(1)}, folder / "model-zz.safetensors")
    load(folder)  # a file the manifest does not list is never read
    resign(folder)
    with pytest.raises(CheckpointError, match="surprise"):
        load(folder)


def test_processor_is_attached_and_left_padded(tmp_path):
    from quota.scenes.model import build_processor

    processor = build_processor()
    processor.tokenizer.padding_side = "right"
    model = quantize_rtn(tiny_llava())
    save_checkpoint(model, tmp_path / "out", Manifest(DEFAULT, ALL, model_fingerprint(model)), processor)
    loaded = load(tmp_path / "out")
    assert loaded.processor.tokenizer.padding_side == "left"
    assert loaded.processor.tokenizer("what color")["input_ids"] == processor.tokenizer("what color")["input_ids"]
    (tmp_path / "out" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="processor cannot be built"):
        load(tmp_path / "out", verify=False)


@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda", 1)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_named(saved, device):
    with pytest.raises(UsageError, match=r"device: cuda.* is not here"):
        load(saved[0], device=device)


def test_unknown_devices_are_refused_before_anything_is_read(tmp_path):
    for device in ("gpu", "meta", "cpu:x"):
        with pytest.raises(UsageError, match="device: expected cpu, cuda or cuda:N"):
            load(tmp_path / "nowhere", device=device)


def test_everything_that_is_loaded_moves(saved):
    model = load(saved[0], device="cpu").to("meta")
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
