"""Samples of the pretrained model's images: `python -m tools.pretrained.samples OUT [--split test --count 2000]`.

OUT/samples.json with OUT/images, as `quota calibrate`, `quota recipe` and `quota eval --samples` read them. Tasks are
named `kind/task` and come in turn, one question per image, so that questions are independent draws; calibration samples
also describe. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from quota.core.files import atomic_folder
from quota.scenes import crowd_questions
from quota.scenes import generate as g
from quota.scenes import kinds as k
from quota.scenes.assets import SAMPLES_SCHEMA
from tools.pretrained.lessons import CAPTION, CROWD, READ, SCENE, Segment, whole_lesson

# three crowds for a scene and a page: the harder images are the purpose
_TURNS = (CROWD, CROWD, SCENE, CROWD, "document", CROWD, SCENE, CROWD, "chart", CROWD, SCENE, CROWD, "scene_text")
_TASKS = {
    CROWD: tuple(t for t in crowd_questions.TASKS if t != "follow_up"),
    SCENE: g.TASKS,
    **{kind: k.TASKS[kind] for kind in _TURNS if kind in k.PAGES},
}
_DESCRIBED = {CROWD: CAPTION, SCENE: CAPTION}
_JPEG_QUALITY = 95


def samples(split: str) -> Iterator[tuple[str, Segment, Any]]:
    """Endless (kind, segment of one turn, image) of a split, each of another image; every fourth of calibration is a
    description. Dialogues are left out: a samples file has no place for them."""
    asked = dict.fromkeys(_TASKS, 0)
    index = dict.fromkeys(_TASKS, 0)
    for number in count():
        kind = _TURNS[number % len(_TURNS)]
        described = split == "calibration" and number % 4 == 3
        task = _DESCRIBED.get(kind, READ) if described else _TASKS[kind][asked[kind] % len(_TASKS[kind])]
        asked[kind] += not described
        found = None
        while found is None:  # an image that allows no question of this task is passed over
            lesson = whole_lesson(kind, split, index[kind])
            index[kind] += 1
            found = next((segment for segment in lesson.segments if segment.task == task), None)
        yield kind, found, lesson.images[0]


def write(out: Path, split: str, number: int) -> Path:
    """Write `number` samples of a split; returns the path of samples.json. An older such folder is replaced when the
    new one is complete."""
    with atomic_folder(
        out, lambda file: re.fullmatch(r"samples\.json|images/\d{5,}\.jpg", file.as_posix()) is not None
    ) as fresh:
        (fresh / "images").mkdir()
        records = []
        for at, (kind, segment, image) in enumerate(islice(samples(split), number)):
            name = f"images/{at:05d}.jpg"
            image.save(fresh / name, quality=_JPEG_QUALITY)
            (asked, answer), task = segment.turns[0], f"{kind}/{segment.task}"
            records.append(
                {"id": f"{split}-{at:05d}", "image": name, "instruction": asked, "answer": answer, "task": task}
            )
        (fresh / "samples.json").write_text(json.dumps({"schema": SAMPLES_SCHEMA, "samples": records}, indent=1) + "\n")
    return out / "samples.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--split", choices=g.SPLITS, default="calibration", help="test is what training never saw (default %(default)s)"
    )
    parser.add_argument("--count", type=int, default=128, help="samples (default %(default)s)")
    args = parser.parse_args()
    print(f"{write(args.out, args.split, args.count)}: {args.count} samples")


if __name__ == "__main__":
    main()
