"""Folders that somebody damaged, edited or prepared: one sentence naming file and field, nothing invented, nothing
run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from quota.core.checkpoint import Manifest, save_checkpoint
from quota.core.errors import CheckpointError
from quota.core.formats import DEFAULT
from quota.models import model_fingerprint
from quota.models.processing import open_processor
from quota.models.rtn import quantize_rtn
from quota.runtime.load import load
from quota.scenes.model import build_processor
from quota.scenes.qwen_model import build_processor as build_qwen_processor
from tests.tiny import tiny_llava, tiny_qwen

ALL = ("vision", "projector", "llm")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> folder: float and quantized LLaVA with processor, float Qwen2.5-VL."""
    root, model = tmp_path_factory.mktemp("foreign"), tiny_llava()
    model.save_pretrained(root / "float")
    build_processor().save_pretrained(root / "float")
    tiny_qwen().save_pretrained(root / "qwen")
    manifest = Manifest(DEFAULT, ALL, model_fingerprint(model))
    save_checkpoint(quantize_rtn(model, ALL), root / "quantized", manifest, build_processor())
    return root


@pytest.fixture
def copy(folders, tmp_path):
    def made(kind):
        return shutil.copytree(folders / kind, tmp_path / kind)

    return made


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def one_line(folder, message, **options):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder, verify=False, **options)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("float", "model.language_model.layers.2.mlp.up_proj.weight"),
        ("float", "lm_head.weight"),
        ("float", "model.multi_modal_projector.linear_1.bias"),
        ("qwen", "model.visual.blocks.1.attn.qkv.weight"),
        ("qwen", "model.language_model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_float_model_with_a_tensor_missing_is_not_completed_with_random_numbers(copy, kind, name):
    folder = copy(kind)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    stored = next(
        key for key in tensors if key.endswith(".".join(name.split(".")[-3 if "projector" in name else -4 :]))
    )  # files have older names than modules
    del tensors[stored]
    save_file(tensors, path, metadata={"format": "pt"})
    one_line(folder, f"tensors missing from the checkpoint: {name}")


def test_a_tied_head_is_not_missing(tmp_path):
    tiny_qwen(tied=True).save_pretrained(tmp_path / "tied")
    model = load(tmp_path / "tied")
    assert model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()


def test_a_quantized_model_refuses_to_be_saved_without_its_manifest(folders, tmp_path):
    import quota.runtime  # noqa: F401 - registers the method

    for model in (
        load(folders / "quantized"),
        AutoModelForImageTextToText.from_pretrained(folders / "quantized", dtype=torch.float32),
    ):
        with pytest.raises(CheckpointError, match="copy the folder"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


_ALONE = """
import sys, transformers
for kind in ("AutoModelForImageTextToText", "LlavaForConditionalGeneration"):
    try:
        getattr(transformers, kind).from_pretrained(sys.argv[1])
    except Exception as error:
        print(kind, str(error).splitlines()[-1])
"""


def test_transformers_alone_refuses_the_folder(folders):
    """Through both doors of a process that never imported quota."""
    result = subprocess.run(
        [sys.executable, "-c", _ALONE, str(folders / "quantized")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    said = [line for line in result.stdout.splitlines() if "import-quota-first" in line]
    assert [line.split()[0] for line in said] == ["AutoModelForImageTextToText", "LlavaForConditionalGeneration"]


def test_every_checkpoint_says_how_to_open_it(folders):
    text = (folders / "quantized" / "README.md").read_text()
    assert (
        "quota.load(" in text
        and "import quota.runtime" in text
        and "README.md" in Manifest.load(folders / "quantized").files
    )


@pytest.mark.parametrize("kind", ["float", "quantized"])
@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(copy, monkeypatch, kind, name):
    folder, ran = copy(kind), []
    (folder / "code.py").write_text("raise SystemExit('ran')")
    value = {
        "AutoConfig": "code.C",
        "AutoProcessor": "code.P",
        "AutoTokenizer": ["code.T", None],
        "AutoModelForImageTextToText": "code.M",
    }
    edit(folder / name, lambda d: d.update(auto_map=value))
    monkeypatch.setattr("builtins.input", lambda *_: ran.append(1) or "y")
    one_line(folder, rf"{name}: auto_map: names code")
    edit(folder / name, lambda d: (d.pop("auto_map"), d.update(image_processor={"auto_map": value})))
    one_line(folder, rf"{name}: auto_map: names code")
    assert not ran


def test_files_beside_the_manifest_are_not_used(copy, folders):
    folder, before = copy("quantized"), load(folders / "quantized").processor
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "EVIL"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "what"}))
    (folder / "added_tokens.json").write_text(json.dumps({"EVIL": 3}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "evil.jinja").write_text("EVIL")
    (folder / "adapter_config.json").write_text("{}")
    processor = load(folder).processor
    assert (
        processor.chat_template == before.chat_template
        and processor.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    )
    assert processor.tokenizer.special_tokens_map == before.tokenizer.special_tokens_map


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ],
)
def test_a_file_dropped_from_the_manifest_is_refused(copy, name):
    folder = copy("quantized")
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    edit(folder / "quota.json", lambda d: (d["files"].pop(name, None), d["bytes"].pop(name, None)))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(folder)


def deep(folder):
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


@pytest.mark.parametrize("kind", ["float", "quantized"])
@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", ["llava"]),
        ("model_type", "Foo"),
        ("text_config", 3),
        ("text_config.hidden_size", 0),
        ("text_config.hidden_size", 10**30),
        ("text_config.num_hidden_layers", "8"),
        ("text_config.num_hidden_layers", 10**9),
        ("text_config.num_attention_heads", True),
        ("text_config.rope_parameters.rope_type", "spiral"),
        ("text_config.rope_parameters", [1]),
        ("text_config.hidden_act", "os.system"),
        ("text_config.dtype", "float3"),
        ("dtype", 7),
        ("text_config.rms_norm_eps", "x"),
        ("text_config.num_key_value_heads", 3),
        ("vision_config.patch_size", 0),
        ("vision_config.patch_size", 57),
        ("vision_config.image_size", -1),
        ("vision_config.hidden_act", 1),
        ("projector_hidden_act", "none"),
        ("image_token_index", -1),
        ("vision_feature_layer", 99),
        ("vision_feature_select_strategy", "half"),
    ],
)
def test_an_edited_config_names_the_field(copy, kind, field, value):
    folder = copy(kind)

    def change(data):
        *path, last = field.split(".")
        for part in path:
            data = data[part]
        data[last] = value

    edit(folder / "config.json", change)
    one_line(folder, rf"config\.json: {field}: expected")


def test_sizes_that_do_not_fit_each_other(copy):
    folder = copy("float")
    edit(folder / "config.json", lambda d: d["vision_config"].update(hidden_size=33))
    one_line(folder, r"config\.json: not readable .*hidden size")  # transformers' own check
    folder = copy("qwen")
    edit(folder / "config.json", lambda d: d["vision_config"].update(hidden_size=33))
    one_line(folder, r"config\.json: vision_config.hidden_size: expected a multiple of 2 heads")
    edit(folder / "config.json", lambda d: d["vision_config"].update(hidden_size=32, window_size=4))
    one_line(folder, r"config\.json: vision_config.window_size: expected at least")


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_a_config_that_is_no_object_or_too_deep(copy, kind):
    folder = copy(kind)
    deep(folder)
    one_line(folder, r"config\.json: not readable .*nested too deeply")
    for text in ("[]", "null", "", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        (folder / "config.json").write_text(text)
        one_line(folder, r"config\.json: not readable")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    one_line(folder, "config.json")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(modules=[[2]]), "modules: expected a list"),
        (lambda d: d.update(modules=["llm", "tail"]), "modules: expected"),
        (lambda d: d.update(modules=[]), "modules: expected"),
        (lambda d: d.update(regime=[]), "regime: expected"),
        (lambda d: d.update(regime="w2a2"), "regime"),
        (lambda d: (d["files"].update({"x" * 5000: "0"}), d["bytes"].update({"x" * 5000: 1})), "files"),
        (lambda d: (d["files"].update({"a\0b": "0"}), d["bytes"].update({"a\0b": 1})), "files"),
        (lambda d: d["bytes"].update({"config.json": True}), "files"),
        (lambda d: d["bytes"].update({"config.json": -1}), "files"),
        (lambda d: d.update(schema_version=[1] * 10_000), "schema_version"),
        (lambda d: d.update({"y" * 9000: 1}), "unknown field"),
    ],
)
def test_an_edited_manifest_names_the_field(copy, change, message):
    folder = copy("quantized")
    edit(folder / "quota.json", change)
    one_line(folder, message)


def test_a_manifest_too_deep_or_endless(copy):
    folder = copy("quantized")
    (folder / "quota.json").write_text("[" * 100_000)
    one_line(folder, r"quota\.json: not readable")
    (folder / "quota.json").unlink()
    (folder / "quota.json").symlink_to("/dev/zero")
    one_line(folder, r"quota\.json: not readable.*regular file")


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "./nowhere",
        "/nowhere/here",
        "a/b/c",
        "~/x",
        "tests/nowhere",
        "x" * 5000,
        "own er/name",
        "..",
        "a\0b",
        "owner/",
    ],
)
def test_what_cannot_be_a_hub_name_is_not_looked_up(monkeypatch, tmp_path, name):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append(a))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    with pytest.raises(CheckpointError):
        load(name)
    assert not asked


def test_a_hub_name_is_looked_up_once(monkeypatch, folders):
    asked = []

    def absent(name, **options):
        asked.append(name)
        raise OSError("no such repository\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", absent)
    start = time.monotonic()
    one_line("owner/name", "owner/name: no such folder here, and the hub")
    assert asked == ["owner/name"] and time.monotonic() - start < 5
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(folders / "float"))
    assert load("owner/name").processor is not None


def test_a_qwen_processor_is_written_under_upstreams_name(tmp_path):
    build_qwen_processor().save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text())["processor_class"] == "Qwen2_5_VLProcessor"
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    written = json.loads((tmp_path / "processor_config.json").read_text())
    images, videos = (
        written["image_processor"],
        written["video_processor"],
    )  # without one upstream's class stops where torchvision is installed
    assert videos.pop("video_processor_type") == "Qwen2VLVideoProcessor" and images.pop("image_processor_type")
    assert images == videos
    again = open_processor(_with_model_type(tmp_path))
    assert again.to_dict() == build_qwen_processor().to_dict() and not hasattr(again, "video_processor")


def _with_model_type(folder):
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["float", "quantized", "qwen"])
def test_rotary_frequencies_are_not_rounded(folders, kind, dtype):
    exact, low = load(folders / kind), load(folders / kind, dtype=dtype)
    for (name, a), (_, b) in zip(exact.named_buffers(), low.named_buffers(), strict=True):
        if "inv_freq" in name:
            assert b.dtype == torch.float32 and torch.equal(a, b), name
