"""Where the embedded checkpoints and calibration samples are, and the command that draws the samples.

A checkout holds all of them. A wheel holds LLaVA's checkpoint alone, so that it stays small: samples are drawn where
they are missing, by the same function.
`python -m quota.scenes.assets [--family qwen2_5_vl]` writes the family's calibration folder again, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from quota.core.errors import CheckpointError
from quota.core.files import atomic_folder
from quota.core.version import VERSION
from quota.scenes import generate as g
from quota.scenes import kinds as k
from quota.scenes.vocabulary import CAPTION_REQUEST, IMAGE_SIZE

ASSETS = Path(__file__).parent / "assets"
CHECKPOINT = ASSETS / "checkpoint"
CALIBRATION = ASSETS / "calibration"
SAMPLES = CALIBRATION / "samples.json"
SAMPLES_SCHEMA = "quota-samples/1"
SAMPLE_COUNT = 128
FAMILIES = ("llava", "qwen2_5_vl")
DEFAULT_FAMILY = FAMILIES[0]
_JPEG_QUALITY = 90
_KINDS = (*g.TASKS, "caption", "caption")  # one sample in four asks for the whole image


def calibration_sample(index: int, size_px: int = IMAGE_SIZE) -> tuple[g.Scene, str, str, str]:
    """(scene, kind, instruction, answer) number `index` of the calibration split; a pure function."""
    s = g.scene("calibration", index, size_px)
    kind = _KINDS[index % len(_KINDS)]
    by_task = {q.task: q for q in g.questions(s)}
    if kind in by_task:
        return s, kind, by_task[kind].text, by_task[kind].answer
    return s, "caption", CAPTION_REQUEST, g.caption(s, s.seed("caption"))


def mixed_sample(index: int) -> tuple[Any, str, str, str]:
    """(image or None, kind, instruction, answer) number `index` of the mixed set of five kinds, in turn; one image
    in three is read out."""
    kind, number = k.KINDS[index % len(k.KINDS)], index // len(k.KINDS)
    found = k.example(kind, "calibration", number)
    if found.caption is not None and number % 3 == 2:
        return found.image, kind, found.request, found.caption
    asked = found.questions[number % len(found.questions)]
    return found.image, kind, asked.text, asked.answer


def folder_of(family: str) -> Path:
    """Where a family's checkpoint and calibration folder are."""
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {FAMILIES}, got {family!r}")
    return ASSETS if family == "llava" else ASSETS / family


def checkpoint_of(family: str) -> Path:
    """A family's checkpoint folder; CheckpointError where this installation does not hold it."""
    folder = folder_of(family) / "checkpoint"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: the embedded {family} checkpoint is not here; a wheel holds that of {DEFAULT_FAMILY} alone. Run"
            " from a checkout of the repository (`pip install -e .`), or give a checkpoint of your own (--model)"
        )
    return folder


def samples_of(family: str) -> Path:
    """A family's calibration samples (`samples.json`): the checkout's, else drawn once into the user's cache folder
    (XDG_CACHE_HOME). The same bytes as the checkout's where Pillow is the same."""
    shipped = folder_of(family) / "calibration" / "samples.json"
    if shipped.is_file():
        return shipped
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "quota" / VERSION / f"calibration-{family}"
    return folder / "samples.json" if folder.exists() else write_calibration(folder, family=family)


def write_calibration(out: Path, n: int = SAMPLE_COUNT, size_px: int = IMAGE_SIZE, family: str = "llava") -> Path:
    """Draw `n` samples of the calibration split into `out`: scenes of `size_px` for LLaVA, the mixed set for
    Qwen2.5-VL. Returns the path of `samples.json`.

    `samples.json` holds {"schema": "quota-samples/1", "samples": [{"id", "image", "instruction", "answer", "task"}]}
    with image paths
    relative to it (none for text). An older such folder at `out` is replaced when the new one is complete; UsageError
    when it holds anything else.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 sample, got {n}")
    with atomic_folder(
        out, lambda file: re.fullmatch(r"samples\.json|images/\d{3,}\.jpg", file.as_posix()) is not None
    ) as fresh:
        _draw_samples(fresh, n, size_px, family)
    return out / "samples.json"


def _draw_samples(fresh: Path, n: int, size_px: int, family: str) -> None:
    (fresh / "images").mkdir()
    samples = []
    for index in range(n):
        image, kind, instruction, answer = _scene_sample(index, size_px) if family == "llava" else mixed_sample(index)
        sample = {
            "id": f"calibration-{index:03d}",
            "image": f"images/{index:03d}.jpg",
            "instruction": instruction,
            "answer": answer,
            "task": kind,
        }
        if image is None:
            del sample["image"]
        else:
            image.save(fresh / sample["image"], quality=_JPEG_QUALITY)
        samples.append(sample)
    (fresh / "samples.json").write_text(json.dumps({"schema": SAMPLES_SCHEMA, "samples": samples}, indent=1) + "\n")


def _scene_sample(index: int, size_px: int) -> tuple[Any, str, str, str]:
    s, kind, instruction, answer = calibration_sample(index, size_px)
    return g.draw(s), kind, instruction, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="llava")
    parser.add_argument("--out", type=Path, help="default: the family's calibration folder inside the package")
    parser.add_argument("--n", type=int, default=SAMPLE_COUNT)
    args = parser.parse_args()
    out = args.out or folder_of(args.family) / "calibration"
    path = write_calibration(out, args.n, family=args.family)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{path}: {args.n} samples, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
