"""Building a mixed set from tiny local copies in the layouts the data sets are published in."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from quota.calib import sources
from quota.calib.samples import Samples
from quota.calib.sources import build_samples, read_source
from quota.cli.main import app
from quota.core.errors import SampleError, UsageError


def picture(seed: int, kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(data, kind)
    return data.getvalue()


def put(path: Path, data: bytes | str | list | dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        data if isinstance(data, bytes) else (data if isinstance(data, str) else json.dumps(data)).encode()
    )


@pytest.fixture
def copies(tmp_path) -> dict[str, Path]:
    root = tmp_path / "copies"
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
    ]
    put(
        root / "llava/llava_v1_5_mix665k.json",
        [
            *({"id": f"{i}", "image": f"coco/train2017/{i}.jpg", "conversations": turns} for i in range(6)),
            {"id": "text", "conversations": turns},
            {"id": "gone", "image": "gqa/images/none.jpg", "conversations": turns},
        ],
    )
    put(
        root / "wiki/wiki.train.raw",
        "\n".join(["", " = Heading = ", "too short", *(" ".join(f"w{i}{j}" for j in range(100)) for i in range(5))]),
    )
    put(
        root / "textvqa/TextVQA_0.5.1_train.json",
        {
            "dataset_type": "train",
            "data": [
                {"image_id": f"t{i}", "question": "what does it say?", "answers": ["stop", "stop sign", "stop"]}
                for i in range(4)
            ],
        },
    )
    put(
        root / "docvqa/train_v1.0_withQT.json",
        {
            "data": [
                {
                    "questionId": i,
                    "question": "What is the date?",
                    "image": f"documents/d{i}_1.png",
                    "answers": ["May 1"],
                }
                for i in range(4)
            ]
        },
    )
    put(
        root / "ChartQA Dataset/train/train_human.json",
        [{"imgname": f"c{i}.png", "query": "How many?", "label": "7"} for i in range(4)],
    )
    for i in range(6):
        put(root / f"llava/coco/train2017/{i}.jpg", picture(i))
    for i in range(4):
        put(root / f"textvqa/train_images/t{i}.jpg", picture(10 + i))
        put(root / f"docvqa/documents/d{i}_1.png", picture(20 + i, "PNG"))
        put(root / f"ChartQA Dataset/train/png/c{i}.png", picture(30 + i, "PNG"))
    return {
        "llava-mix": root / "llava",
        "wikitext-2": root / "wiki",
        "textvqa": root / "textvqa",
        "docvqa": root / "docvqa",
        "chartqa": root / "ChartQA Dataset",
    }


def test_five_kinds_in_turn(copies, tmp_path):
    made = build_samples(list(copies.items()), 12, tmp_path / "out/samples.json")
    kinds = [sample.task for sample in made]
    assert kinds[:5] == ["conversation", "text", "scene_text", "document", "chart"] and len(made) == 12
    assert [kinds.count(kind) for kind in kinds[:5]] == [3, 3, 2, 2, 2]
    by_kind = {sample.task: sample for sample in made}
    assert (by_kind["conversation"].instruction, by_kind["conversation"].answer) == ("What is it?", "A cat.")
    assert (by_kind["scene_text"].answer, by_kind["document"].answer, by_kind["chart"].answer) == ("stop", "May 1", "7")
    assert (
        by_kind["text"].image_bytes is None
        and len((by_kind["text"].instruction + " " + by_kind["text"].answer).split()) == 100
    )
    assert all((sample.image() is None) == (sample.task == "text") for sample in made)
    assert Samples.load(tmp_path / "out/samples.json").fingerprint == made.fingerprint


def test_the_seed_decides(copies, tmp_path):
    files = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    texts = []
    for file, seed in zip(files, (0, 0, 1), strict=True):
        build_samples([("llava-mix", copies["llava-mix"])], 3, file, seed)
        texts.append(file.read_text().replace(f"{file.stem}_images", ""))
    assert texts[0] == texts[1] != texts[2]


def test_missing_pictures_are_passed_over_and_counted(copies, tmp_path):
    build_samples([("llava-mix", copies["llava-mix"])], 6, tmp_path / "six.json")
    with pytest.raises(SampleError, match=r"expected 7 usable records, got 6 \(1 of 7"):
        build_samples([("llava-mix", copies["llava-mix"])], 7, tmp_path / "seven.json")
    put(copies["chartqa"] / "train/png/c0.png", b"not a picture")
    with pytest.raises(SampleError, match="chartqa: expected 4"):
        build_samples([("chartqa", copies["chartqa"])], 4, tmp_path / "four.json")


def test_parquet_rows_are_read_alike(copies, tmp_path, monkeypatch):
    """The Hugging Face copies: pictures inside the rows."""
    put(tmp_path / "hf/data/train-00000-of-00001.parquet", b"")
    rows = {
        "textvqa": {"image": {"bytes": picture(1), "path": None}, "question": "what?", "answers": ["a", "b", "b"]},
        "docvqa": {"image": {"bytes": picture(1), "path": None}, "question": "what?", "answers": ["b"]},
        "chartqa": {"image": {"bytes": picture(1), "path": None}, "query": "what?", "label": ["b"]},
        "wikitext-2": {"text": " ".join(["word"] * 80)},
    }
    for name, row in rows.items():
        monkeypatch.setattr(sources, "_parquet_rows", lambda file, row=row: iter([row, row]))
        found = read_source(name, tmp_path / "hf")
        assert len(found) == 2 and found[0].answer == ("b" if name != "wikitext-2" else " ".join(["word"] * 40))


def test_real_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"text": ["", " ".join(["word"] * 80)]}), tmp_path / "train-00000-of-00001.parquet")
    assert len(read_source("wikitext-2", tmp_path)) == 1


def test_wrong_sources_are_named(copies, tmp_path):
    with pytest.raises(UsageError, match="expected one of llava-mix"):
        read_source("coco", tmp_path)
    with pytest.raises(UsageError, match=r"TextVQA_\*train\*\.json"):
        read_source("textvqa", tmp_path)
    put(tmp_path / "train_v1.0.json", {"items": []})
    with pytest.raises(SampleError, match="documented layout"):
        read_source("docvqa", tmp_path)
    with pytest.raises(UsageError, match="--count"):
        build_samples(list(copies.items()), 4, tmp_path / "x.json")


def test_files_are_read_through_the_bounded_door(copies, tmp_path, monkeypatch):
    """With or without a byte order mark, of bounded size, and only from regular files."""
    data = (copies["textvqa"] / "TextVQA_0.5.1_train.json").read_text()
    put(tmp_path / "marked/TextVQA_train.json", b"\xef\xbb\xbf" + data.encode())
    assert read_source("textvqa", tmp_path / "marked") == [
        dataclasses.replace(
            record, image=tuple(tmp_path / "marked" / path.relative_to(copies["textvqa"]) for path in record.image)
        )
        for record in read_source("textvqa", copies["textvqa"])
    ]
    passage = " ".join(["word"] * 80)
    put(tmp_path / "wiki/wiki.train.raw", b"\xef\xbb\xbf" + passage.encode())
    assert read_source("wikitext-2", tmp_path / "wiki")[0].instruction.startswith("word")
    put(tmp_path / "deep/train.json", "[" * 100_000)
    put(tmp_path / "bytes/train.json", b"\xff\xfe")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/x_train.json")
    for name, said in (("deep", "recursion|deeply"), ("bytes", "UTF-8"), ("pipe", "regular file")):
        with pytest.raises(SampleError, match=f"{name}.*({said})"):
            read_source("textvqa" if name != "bytes" else "docvqa", tmp_path / name)
    monkeypatch.setattr(sources, "_FILE_BYTES", 100)
    for name in ("textvqa", "wikitext-2"):
        with pytest.raises(SampleError, match="more than 100 bytes"):
            read_source(name, copies[name])


def test_command(copies, tmp_path):
    asked = [f"--source={name}={path}" for name, path in copies.items()]
    result = CliRunner().invoke(
        app, ["samples", "build", *asked, "--count", "5", "--out", str(tmp_path / "s.json"), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kinds"] == dict.fromkeys(
        ("conversation", "text", "scene_text", "document", "chart"), 1
    )
    wrong = CliRunner().invoke(app, ["samples", "build", "--source", "textvqa", "--out", str(tmp_path / "s.json")])
    assert wrong.exit_code == 1 and "NAME=PATH" in wrong.stderr
