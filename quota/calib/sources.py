"""Calibration samples from local copies of public data sets: the mixed set of five kinds.

| source | kind | layout (folder, or the annotation file in it) |
|---|---|---|
| llava-mix | conversation | `llava_v1_5_mix665k.json`: [{"id", "image", "conversations": [{"from", "value"}, ...]}],
images relative to the folder |
| wikitext-2 | text | `wiki.train.raw` or `wiki.train.tokens`, or parquet with column `text` |
| textvqa | scene_text | `TextVQA_0.5.1_train.json`: {"data": [{"image_id", "question", "answers"}]} with
`train_images/ID.jpg`, or parquet |
| docvqa | document | `train_v1.0*.json`: {"data": [{"image", "question", "answers"}]}, images relative to the folder
(or below `train/`), or parquet |
| chartqa | chart | `train/train_human.json`: [{"imgname", "query", "label"}] with `train/png/NAME`, or parquet |

Parquet files are those of the data sets' Hugging Face copies (images inside: {"bytes", "path"}) and need pyarrow.
Which records are taken follows from the seed alone; a record whose image is missing or broken is passed over, and too
few usable ones are an error.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota.calib.samples import SCHEMA, Samples
from quota.core import images
from quota.core.documents import read_text
from quota.core.errors import ImageError, SampleError, UsageError
from quota.core.files import atomic_write_bytes, atomic_write_text

_FILE_BYTES = 2 << 30  # llava_v1_5_mix665k.json, the largest, has 1.03 GB
_PASSAGE_WORDS = (60, 160)  # shorter paragraphs are passed over, longer ones cut


@dataclass(frozen=True)
class Record:
    """One usable entry of a source. image: its bytes, or where they may be (the first file that exists), or None for
    text."""

    instruction: str
    answer: str
    image: bytes | tuple[Path, ...] | None = None

    def image_bytes(self) -> bytes | None:
        """The encoded image; None when it is missing or refused (or the record is text)."""
        data = self.image
        try:
            if isinstance(data, tuple):
                found = next((path for path in data if path.is_file()), None)
                data = images.read_file(found) if found else None
            if data is not None:
                images.decode(data)
        except ImageError:
            return None
        return data


@dataclass(frozen=True)
class Source:
    """One public data set: its kind of sample, the annotation files to look for, and how a row is read."""

    kind: str
    patterns: tuple[str, ...]
    rows: Callable[[Any, Path], Iterator[Record]]  # parsed JSON (or text lines), folder
    parquet: Callable[[dict[str, Any]], Record | None]


def _llava_mix(data: Any, folder: Path) -> Iterator[Record]:
    for row in data:
        record = _conversation(
            row.get("conversations") or [],
            (folder / row["image"], folder / "images" / row["image"]) if row.get("image") else None,
        )
        if record is not None:
            yield record


def _conversation(turns: Any, image: bytes | tuple[Path, ...] | None) -> Record | None:
    """The first question and its answer; only records with an image (text has a source of its own)."""
    if image is None or len(turns) < 2:
        return None
    said = [str(turn.get("value", "")).replace("<image>", "").strip() for turn in turns[:2]]
    return Record(said[0], said[1], image) if all(said) else None


def _passages(lines: Any, folder: Path) -> Iterator[Record]:
    for line in lines:
        record = _passage(str(line))
        if record is not None:
            yield record


def _passage(text: str) -> Record | None:
    words = text.split()
    if len(words) < _PASSAGE_WORDS[0] or words[0] == "=":  # headings stand between equal signs
        return None
    words = words[: _PASSAGE_WORDS[1]]
    half = len(words) // 2
    return Record(" ".join(words[:half]), " ".join(words[half:]))


def _textvqa(data: Any, folder: Path) -> Iterator[Record]:
    for row in data["data"]:
        name = f"{row['image_id']}.jpg"
        yield Record(
            row["question"],
            _favourite(row["answers"]),
            (folder / "train_images" / name, folder / "images" / name, folder / name),
        )


def _docvqa(data: Any, folder: Path) -> Iterator[Record]:
    for row in data["data"]:
        name = row["image"]
        yield Record(
            row["question"],
            _favourite(row["answers"]),
            (folder / name, folder / "train" / name, folder / "documents" / Path(name).name),
        )


def _chartqa(data: Any, folder: Path) -> Iterator[Record]:
    for row in data:
        yield Record(row["query"], _favourite(row["label"]), (folder / "png" / row["imgname"], folder / row["imgname"]))


def _favourite(answers: Any) -> str:
    """The most frequent answer, the first of equals."""
    given = [str(answer) for answer in (answers if isinstance(answers, (list, tuple)) else [answers])]
    return Counter(given).most_common(1)[0][0] if given else ""


def _asked(question: str, answer: str) -> Callable[[dict[str, Any]], Record | None]:
    def read(row: dict[str, Any]) -> Record | None:
        image = (row.get("image") or {}).get("bytes")
        return Record(row[question], _favourite(row[answer]), image) if image else None

    return read


SOURCES: dict[str, Source] = {
    "llava-mix": Source(
        "conversation",
        ("llava_v1_5_mix665k.json", "*mix*.json", "*.json"),
        _llava_mix,
        lambda row: _conversation(row.get("conversations") or [], (row.get("image") or {}).get("bytes")),
    ),
    "wikitext-2": Source("text", ("wiki.train.raw", "wiki.train.tokens"), _passages, lambda row: _passage(row["text"])),
    "textvqa": Source("scene_text", ("TextVQA_*train*.json", "*train*.json"), _textvqa, _asked("question", "answers")),
    "docvqa": Source("document", ("train_v1.0*.json", "*train*.json"), _docvqa, _asked("question", "answers")),
    "chartqa": Source(
        "chart",
        ("train_human.json", "train/train_human.json", "**/train_human.json"),
        _chartqa,
        _asked("query", "label"),
    ),
}


def read_source(name: str, path: Path) -> list[Record]:
    """All records of a local copy. UsageError for an unknown name or a path without the documented files; SampleError
    for a file of another layout."""
    if name not in SOURCES:
        raise UsageError(f"--source: expected one of {', '.join(SOURCES)}, got {name!r}")
    source, file = SOURCES[name], _annotations(name, path)
    try:
        if file.suffix == ".parquet":
            files = sorted(path.rglob("*train*.parquet")) if path.is_dir() else [path]
            found = [source.parquet(row) for each in files for row in _parquet_rows(each)]
            records = [record for record in found if record is not None]
        elif file.suffix == ".json":
            records = list(source.rows(json.loads(read_text(file, _FILE_BYTES)), file.parent))
        else:
            records = list(source.rows(read_text(file, _FILE_BYTES).splitlines(), file.parent))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise SampleError(
            f"--source {name}: {file} does not have the documented layout ({type(error).__name__}: {error})"
        ) from error
    return [record for record in records if record.instruction.strip() and record.answer.strip()]


def _annotations(name: str, path: Path) -> Path:
    if path.is_file():
        return path
    for pattern in (*SOURCES[name].patterns, "**/*train*.parquet"):
        found = sorted(path.glob(pattern)) if path.is_dir() else []
        if found:
            return found[0]
    raise UsageError(
        f"--source {name}: no {' or '.join(SOURCES[name].patterns)} and no *train*.parquet in {path}; expected a local"
        " copy of the data set"
    )


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError(
            f"{file}: reading parquet needs pyarrow; install it with `pip install pyarrow`, or use the data set's JSON"
            " files"
        ) from None
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=64):
        yield from batch.to_pylist()


def build_samples(sources: Sequence[tuple[str, Path]], count: int, out: Path, seed: int = 0) -> Samples:
    """Write `count` samples, shared evenly over `sources` (the first ones get the remainder), to `out` with their
    images in `<stem>_images` beside it.

    Sources take turns in the file. Equal arguments give equal bytes. UsageError and SampleError as above, also when a
    source has too few.
    """
    if count < len(sources) or not sources:
        raise UsageError(f"--count: expected at least one sample for each of the {len(sources)} sources, got {count}")
    if len({name for name, _ in sources}) < len(sources):
        raise UsageError("--source: each data set may be given once")
    shares = [count // len(sources) + (number < count % len(sources)) for number in range(len(sources))]
    taken = [_take(name, path, share, seed) for (name, path), share in zip(sources, shares, strict=True)]
    folder = out.with_name(f"{out.stem}_images")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for turn in range(max(shares)):
        for (name, _), records in zip(sources, taken, strict=True):
            if turn < len(records):
                rows.append(_row(f"{name}-{turn:03d}", SOURCES[name].kind, *records[turn], folder))
    atomic_write_text(out, json.dumps({"schema": SCHEMA, "samples": rows}, indent=1, ensure_ascii=False) + "\n")
    return Samples.load(out)


def _take(name: str, path: Path, share: int, seed: int) -> list[tuple[Record, bytes | None]]:
    records = read_source(name, path)
    order = list(range(len(records)))
    random.Random(f"{seed}:{name}").shuffle(order)
    taken: list[tuple[Record, bytes | None]] = []
    missing = 0
    for index in order:
        if len(taken) == share:
            break
        data = records[index].image_bytes()
        if data is None and records[index].image is not None:
            missing += 1
            continue
        taken.append((records[index], data))
    if len(taken) < share:
        lost = f"{missing} of {len(records)} have no readable image in {path}"
        raise SampleError(f"--source {name}: expected {share} usable records, got {len(taken)} ({lost})")
    return taken


def _row(sample: str, kind: str, record: Record, data: bytes | None, folder: Path) -> dict[str, str]:
    row = {"id": sample, "instruction": record.instruction, "answer": record.answer, "task": kind}
    if data is not None:
        suffix = images.inspect(data).format.lower()
        name = f"{sample}-{hashlib.sha256(data).hexdigest()[:8]}.{suffix}"
        atomic_write_bytes(folder / name, data)
        row["image"] = f"{folder.name}/{name}"
    return row
