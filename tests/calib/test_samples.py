"""The samples file: what it reads, what identifies it, and what it says about a bad one."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quota.calib.samples import Sample, Samples, encode
from quota.core.errors import RecipeError, SampleError
from quota.core.recipe import Recipe
from quota.scenes.model import build_processor


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(
        out, "PNG"
    )
    return out.getvalue()


def write(folder: Path, *samples: object, schema: object = "quota-samples/1") -> Path:
    path = folder / "samples.json"
    path.write_text(json.dumps({"schema": schema, "samples": list(samples)}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(picture())
    return tmp_path


A = {"id": "a", "image": "a.png", "instruction": "what is this ?", "answer": "a ring"}


def test_load(folder: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture(1)).decode()
    samples = Samples.load(
        write(folder, A, {"id": "b", "image": url, "instruction": "and this ?"}, {"id": "c", "instruction": "hello"})
    )
    assert [s.id for s in samples] == ["a", "b", "c"]
    assert samples[0].image().size == (40, 30)
    assert samples[1].image().mode == "RGB"
    assert samples[2].image() is None
    assert len(samples.first(2)) == 2


def test_fingerprint_follows_content_not_place(folder: Path) -> None:
    first = Samples.load(write(folder, A))
    shutil.copytree(folder, folder / "elsewhere")
    assert Samples.load(folder / "elsewhere" / "samples.json").fingerprint == first.fingerprint
    assert Samples.load(write(folder, {**A, "answer": "a star"})).fingerprint != first.fingerprint
    (folder / "a.png").write_bytes(picture(2))
    assert Samples.load(write(folder, A)).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "expected at least one sample, got an empty list"),
        ([1], r"samples\[0\]: expected an object, got int"),
        ([{**A, "id": 3}], r"samples\[0\].id: expected a text, got 3"),
        ([A, A], "sample 'a': this id appears twice"),
        ([{**A, "imgae": "x"}], "sample 'a': unknown key 'imgae'"),
        ([{**A, "instruction": " "}], "sample 'a': instruction: expected a text"),
        ([{**A, "image": 5}], "sample 'a': image: expected a text, got int"),
        ([{**A, "image": "none.png"}], r"sample 'a': image: .*none.png cannot be read"),
        ([{**A, "image": "data:image/png,abc"}], "sample 'a': image: expected data:image/"),
        ([{**A, "image": "data:image/png;base64,@@"}], "sample 'a': image: the data URL is not valid base64"),
        ([{**A, "image": "data:image/png;base64,YWJj"}], "sample 'a': image: not a readable image"),
        ([{**A, "image": "bad\0name"}], "sample 'a': image: .*cannot be read"),
        ([{**A, "instruction": "what \ud800 ?"}], "sample 'a': instruction: expected Unicode text"),
        ([{**A, "answer": "\udfff"}], "sample 'a': answer: expected Unicode text"),
        ([{**A, "id": "\ud800"}], r"sample '.ud800': id: expected Unicode text"),
    ],
)
def test_errors_name_the_sample(folder: Path, samples: list, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        Samples.load(write(folder, *samples))


def test_truncated_picture_names_the_sample(folder: Path) -> None:
    path = write(folder, A)
    (folder / "a.png").write_bytes(picture()[:500])
    with pytest.raises(SampleError, match="sample 'a': image: not a readable image"):
        Samples.load(path)


def test_file_errors(folder: Path) -> None:
    with pytest.raises(SampleError, match=r"none.json: cannot be read"):
        Samples.load(folder / "none.json")
    with pytest.raises(SampleError, match="schema: expected"):
        Samples.load(write(folder, A, schema="other/1"))
    (folder / "samples.json").write_text("{")
    with pytest.raises(SampleError, match="not valid JSON"):
        Samples.load(folder / "samples.json")
    (folder / "samples.json").write_bytes(b"\xff\xfe")
    with pytest.raises(SampleError, match="not UTF-8"):
        Samples.load(folder / "samples.json")


def test_encode() -> None:
    processor = build_processor(56)
    sample = Sample("a", "what color is the star ?", picture(), "red")
    inputs = encode(processor, sample)
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 16
    assert processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])[-2:] == ["assistant", ":"]
    assert encode(processor, sample, answer=True)["input_ids"].shape[1] == inputs["input_ids"].shape[1] + 1
    assert "pixel_values" not in encode(processor, Sample("t", "hello"))
    processor.chat_template = None
    assert encode(processor, sample)["input_ids"].tolist() == inputs["input_ids"].tolist()


def test_a_byte_order_mark_is_no_content(folder: Path) -> None:
    path = write(folder, A)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Samples.load(path)[0].id == "a"


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_a_regular_file_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "samples.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    with pytest.raises(SampleError, match=r"not a regular file|Is a directory"):
        Samples.load(path)
    with pytest.raises(RecipeError, match=r"not a regular file|Is a directory"):
        Recipe.load(path)


def test_samples_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, A, {**A, "id": "b"})
    for name, limit, message in (
        ("MAX_FILE_BYTES", 50, "it has more than 50 bytes"),
        ("MAX_SAMPLES", 1, "expected at most 1, got 2"),
        ("MAX_IMAGE_BYTES", 2 * len(picture()) - 1, "passed at sample 'b'"),
    ):
        with monkeypatch.context() as limited, pytest.raises(SampleError, match=message):
            limited.setattr(f"quota.calib.samples.{name}", limit)
            Samples.load(path)


def test_the_mark_of_a_picture_is_no_text() -> None:
    processor = build_processor(56)
    for sample in (Sample("a", "what is <image> ?", picture()), Sample("a", "what ?", None, "an <image>")):
        with pytest.raises(SampleError, match=r"sample 'a': (instruction|answer): expected text without <image>"):
            encode(processor, sample)
