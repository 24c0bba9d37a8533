from __future__ import annotations

import json

import pytest
import torch

from quota.core.checkpoint import CheckpointWriter, Manifest, is_quantized_folder
from quota.core.checkpoint_files import iterate_tensors, tensor_shapes, verify_files, weight_files
from quota.core.errors import CheckpointError
from quota.core.formats import DEFAULT


def manifest() -> Manifest:
    return Manifest(DEFAULT, ("llm",), "sha256:0", {"seed": 3})


def tensors(count: int = 6) -> dict[str, torch.Tensor]:
    return {f"block.{i}.w": torch.full((10,), float(i)) for i in range(count)}


def write(folder, max_shard_bytes: int = 1000) -> Manifest:
    with CheckpointWriter(folder, manifest(), max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors().items():
            writer.add({name: tensor})
        writer.add_config({"model_type": "llava"})
    return writer.manifest


@pytest.mark.parametrize("limit, shards", [(1000, 1), (80, 3), (50, 6), (1, 6)])
def test_shards(tmp_path, limit, shards):
    written = write(tmp_path / "out", limit)
    loaded = Manifest.load(tmp_path / "out")
    assert loaded == written and loaded.calibration == {"seed": 3}
    verify_files(tmp_path / "out", loaded)
    files = weight_files(tmp_path / "out", loaded)
    assert len(files) == shards and (files[0].name == "model.safetensors") == (shards == 1)
    got = dict(iterate_tensors(files))
    assert got.keys() == tensors().keys() and all(torch.equal(got[n], t) for n, t in tensors().items())
    assert tensor_shapes(files) == dict.fromkeys(tensors(), (10,))
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 240 and set(index["weight_map"]) == set(tensors())


def test_equal_input_gives_equal_bytes(tmp_path):
    assert write(tmp_path / "a", 80) == write(tmp_path / "b", 80)


def test_config_is_marked(tmp_path):
    write(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "quota", "regime": "w4a4kv4", "modules": ["llm"]}
    assert is_quantized_folder(tmp_path / "out") and not is_quantized_folder(tmp_path)


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "out", manifest()) as writer:
        writer.add(tensors())
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(CheckpointError, match="written twice"),
        CheckpointWriter(tmp_path / "out", manifest()) as writer,
    ):
        writer.add(tensors())
        writer.add({"block.0.w": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="max_shard_bytes"):
        CheckpointWriter(tmp_path / "out", manifest(), max_shard_bytes=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(schema_version=2), "schema_version"),
        (lambda d: d.pop("modules"), "modules: expected a list"),
        (lambda d: d.update(extra=1), "extra: unknown field"),
        (lambda d: d["files"].update({"../x": "0"}), "plain file name"),
        (lambda d: d["files"].update({"y": 3}), "plain file name"),
        (lambda d: d.update(files={}), None),
    ],
)
def test_malformed_manifest(tmp_path, change, message):
    write(tmp_path / "out")
    path = tmp_path / "out" / "quota.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    if message is None:
        with pytest.raises(CheckpointError, match=r"at least one \.safetensors"):
            weight_files(tmp_path / "out", Manifest.load(tmp_path / "out"))
        return
    with pytest.raises(CheckpointError, match=message):
        Manifest.load(tmp_path / "out")


def test_manifest_that_is_no_json(tmp_path):
    with pytest.raises(CheckpointError, match="found no file"):
        Manifest.load(tmp_path)
    for text in ("{", "[]", "\0"):
        (tmp_path / "quota.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"quota\.json"):
            Manifest.load(tmp_path)


def test_a_name_in_two_files(tmp_path):
    from safetensors.torch import save_file

    for name in ("a", "b"):
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="two files"):
        tensor_shapes([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
