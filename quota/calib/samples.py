"""The calibration samples: a static JSON of images and instructions, so that every run and every method sees the same
ones.

    {"schema": "quota-samples/1",
     "samples": [{"id": "a", "image": "images/a.jpg", "instruction": "what is this?", "answer": "a cat", "task":
     "name"}]}

`image` is a path relative to the file or a `data:image/...;base64,` URL (read through `quota.core.images`); without it
the sample is text only. `answer`
and `task` are optional: calibration reads the answer after the instruction, `quota eval` compares with it and groups
its accuracies by `task`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quota.core import images
from quota.core.documents import read_text
from quota.core.errors import ImageError, SampleError
from quota.models.base import Family
from quota.models.images import ImageInfo, PatchGrid
from quota.models.processing import render, reserved_mark, user_turn

if TYPE_CHECKING:
    from PIL import Image

SCHEMA = "quota-samples/1"
MAX_FILE_BYTES = 128 << 20  # a parsed document takes up to some twenty times its text
MAX_SAMPLES = 100_000
MAX_IMAGE_BYTES = 4 << 30  # of all images together, which are held in memory as they are stored
_OPTIONAL = ("image", "answer", "task")


@dataclass(frozen=True)
class Sample:
    """One image (encoded bytes, as stored) and what is asked about it."""

    id: str
    instruction: str
    image_bytes: bytes | None = field(default=None, repr=False)
    answer: str | None = None
    task: str | None = None

    def image(self) -> Image.Image | None:
        """The image decoded to RGB, or None for a text-only sample. ImageError, a SampleError, names the sample when
        it is refused."""
        return None if self.image_bytes is None else images.decode(self.image_bytes, name=f"sample {self.id!r}: image")


@dataclass(frozen=True)
class Samples:
    """Samples in file order. `fingerprint` covers ids, texts and image bytes, not where the files lie."""

    items: tuple[Sample, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.items)

    def __getitem__(self, index: int) -> Sample:
        return self.items[index]

    @classmethod
    def of(cls, items: list[Sample]) -> Samples:
        """Samples made in memory. SampleError when there are none or ids repeat."""
        if not items:
            raise SampleError("samples: expected at least one, got none")
        seen: set[str] = set()
        for sample in items:
            if sample.id in seen:
                raise SampleError(f"sample {sample.id!r}: this id appears twice; ids must be distinct")
            seen.add(sample.id)
        return cls(tuple(items), _fingerprint(items))

    def first(self, count: int) -> Samples:
        """The first `count` samples (all when there are fewer); the fingerprint follows the content."""
        return self if count >= len(self) else Samples.of(list(self.items[:count]))

    @classmethod
    def load(cls, path: str | Path) -> Samples:
        """Read a samples file and decode every image once, so that a bad one is found before the work starts.

        SampleError says what is wrong and names the sample: missing or corrupt image, wrong type, unknown key,
        repeated id, empty file.
        """
        path = Path(path)
        try:
            text = read_text(path, MAX_FILE_BYTES)
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise SampleError(
                f"samples {path}: cannot be read ({reason}); expected a {SCHEMA} JSON file with images as files"
                " beside it"
            ) from None
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SampleError(f"samples {path}: not valid JSON ({error}); expected a {SCHEMA} file") from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise SampleError(
                f'samples {path}: schema: expected {{"schema": "{SCHEMA}", "samples": [...]}}, got {found!r}'
            )
        records = data.get("samples")
        if not isinstance(records, list):
            raise SampleError(f"samples {path}: samples: expected a list, got {type(records).__name__}")
        if not records:
            raise SampleError(f"samples {path}: samples: expected at least one sample, got an empty list")
        if len(records) > MAX_SAMPLES:
            raise SampleError(
                f"samples {path}: samples: expected at most {MAX_SAMPLES}, got {len(records)}; cut the file into"
                " several"
            )
        items, held = [], 0
        for number, record in enumerate(records):
            items.append(_read(record, number, path))
            held += len(items[-1].image_bytes or b"")
            if held > MAX_IMAGE_BYTES:
                raise SampleError(
                    f"samples {path}: expected at most {MAX_IMAGE_BYTES} bytes of images, passed at sample"
                    f" {items[-1].id!r}; cut the file"
                )
        samples = cls.of(items)
        for sample in samples:
            sample.image()
        return samples


def _read(record: object, number: int, path: Path) -> Sample:
    if not isinstance(record, dict):
        raise SampleError(f"samples {path}: samples[{number}]: expected an object, got {type(record).__name__}")
    name = record.get("id")
    if not isinstance(name, str) or not name:
        raise SampleError(f"samples {path}: samples[{number}].id: expected a text, got {name!r}")
    unknown = sorted(set(record) - {"id", "instruction", *_OPTIONAL})
    if unknown:
        raise SampleError(
            f"sample {name!r}: unknown key {unknown[0]!r}; known are id, instruction, {', '.join(_OPTIONAL)}"
        )
    for key, value in record.items():
        if isinstance(value, str) and not _is_unicode(value):
            raise SampleError(
                f"sample {name!r}: {key}: expected Unicode text, got half of a surrogate pair; write the whole"
                " character"
            )
    instruction = record.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise SampleError(f"sample {name!r}: instruction: expected a text, got {instruction!r}")
    for key in _OPTIONAL:
        if record.get(key) is not None and not isinstance(record[key], str):
            raise SampleError(f"sample {name!r}: {key}: expected a text, got {type(record[key]).__name__}")
    image = record.get("image")
    return Sample(
        name,
        instruction,
        None if image is None else _image_bytes(image, name, path.parent),
        record.get("answer"),
        record.get("task"),
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image_bytes(image: str, name: str, folder: Path) -> bytes:
    if image.startswith("data:"):
        return images.read_data_url(image, name=f"sample {name!r}: image")
    try:
        return images.read_file(folder / image, name=f"sample {name!r}: image")
    except ImageError as error:
        raise ImageError(f"{error}; paths are relative to the samples file", too_large=error.too_large) from None


def _fingerprint(items: list[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in items:
        image = None if sample.image_bytes is None else hashlib.sha256(sample.image_bytes).hexdigest()
        digest.update(
            json.dumps([sample.id, sample.instruction, sample.answer, image], ensure_ascii=True).encode() + b"\n"
        )
    return f"sha256:{digest.hexdigest()}"


def check_texts(processor: Any, samples: Iterable[Sample]) -> None:
    """SampleError for the first sample whose instruction or answer holds the processor's mark for an image; before the
    work, not in its middle."""
    for sample in samples:
        for name, text in (("instruction", sample.instruction), ("answer", sample.answer or "")):
            mark = reserved_mark(processor, text)
            if mark is not None:
                raise SampleError(
                    f"sample {sample.id!r}: {name}: expected text without {mark}, which stands for an image; name the"
                    " image in `image`"
                )


@dataclass(frozen=True)
class Prompts:
    """The samples as the model reads them. ids: token ids of each sample. images: what a selection reads of each
    sample's images, a raster each. grids: of each sample's images (`ImageInput.grid`)."""

    ids: tuple[list[int], ...]
    images: tuple[tuple[ImageInfo, ...], ...]
    grids: tuple[tuple[PatchGrid | None, ...], ...]

    @property
    def all_grids(self) -> list[PatchGrid | None]:
        """Of every image in order over all samples."""
        return [grid for own in self.grids for grid in own]

    @classmethod
    def of(cls, processor: Any, family: Family, samples: Iterable[Sample]) -> Prompts:
        """Every sample encoded once, pixels not kept."""
        ids, images, grids = list[list[int]](), list[tuple[ImageInfo, ...]](), list[tuple[PatchGrid | None, ...]]()
        for sample in samples:
            encoded = encode(processor, sample, answer=True)
            own = family.images(encoded)
            ids.append(encoded["input_ids"][0].tolist())
            images.append(tuple(raster for image in own for raster in family.shown(image)))
            grids.append(tuple(image.grid for image in own))
        return cls(tuple(ids), tuple(images), tuple(grids))


def encode(processor: Any, sample: Sample, answer: bool = False) -> Any:
    """Model inputs of one sample as the processor makes them: input_ids, attention_mask [1, S] and, with an image,
    pixel_values [1, 3, H, W] (patches [n, patch] and image_grid_thw [1, 3] where resolution is dynamic).

    The prompt is rendered by the processor's chat template (LLaVA-1.5's form where it has none), with the assistant's
    turn opened; with
    `answer` the stored answer follows it. SampleError for a text that holds the mark for an image.
    """
    check_texts(processor, [sample])
    image = sample.image()
    text = render(processor, user_turn(sample.instruction, int(image is not None)))
    if answer and sample.answer:
        text = f"{text}{'' if text.endswith(chr(10)) else ' '}{sample.answer}"
    if image is None:
        return processor(text=[text], return_tensors="pt")
    return processor(images=[image], text=[text], return_tensors="pt")
