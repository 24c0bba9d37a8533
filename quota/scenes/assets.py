"""Where the embedded checkpoint and calibration samples are, and the command that draws the samples.

`python -m quota.scenes.assets` writes `quota/scenes/assets/calibration` again, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from quota.scenes import generate as g
from quota.scenes.vocabulary import CAPTION_REQUEST, IMAGE_SIZE

ASSETS = Path(__file__).parent / "assets"
CHECKPOINT = ASSETS / "checkpoint"
CALIBRATION = ASSETS / "calibration"
SAMPLES = CALIBRATION / "samples.json"
SAMPLES_SCHEMA = "quota-samples/1"
SAMPLE_COUNT = 128
_JPEG_QUALITY = 90
_KINDS = (*g.TASKS, "caption", "caption")  # one sample in four asks for the whole picture


def calibration_sample(index: int, size_px: int = IMAGE_SIZE) -> tuple[g.Scene, str, str, str]:
    """(scene, kind, instruction, answer) number `index` of the calibration split; a pure function."""
    s = g.scene("calibration", index, size_px)
    kind = _KINDS[index % len(_KINDS)]
    by_task = {q.task: q for q in g.questions(s)}
    if kind in by_task:
        return s, kind, by_task[kind].text, by_task[kind].answer
    return s, "caption", CAPTION_REQUEST, g.caption(s, s.seed("caption"))


def write_calibration(out: Path, n: int = SAMPLE_COUNT, size_px: int = IMAGE_SIZE) -> Path:
    """Draw `n` scenes of the calibration split, one instruction each, into `out`; returns the path of `samples.json`.

    `samples.json` holds {"schema": "quota-samples/1", "samples": [{"id", "image", "instruction", "answer", "task"}]} with image paths
    relative to it. An existing folder at `out` is replaced only when the new one is complete.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 sample, got {n}")
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(out.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "images").mkdir(parents=True)
    samples = []
    for index in range(n):
        s, kind, instruction, answer = calibration_sample(index, size_px)
        name = f"images/{index:03d}.jpg"
        g.draw(s).save(fresh / name, quality=_JPEG_QUALITY)
        samples.append({"id": f"calibration-{index:03d}", "image": name, "instruction": instruction, "answer": answer, "task": kind})
    (fresh / "samples.json").write_text(json.dumps({"schema": SAMPLES_SCHEMA, "samples": samples}, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    fresh.replace(out)
    return out / "samples.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CALIBRATION)
    parser.add_argument("--n", type=int, default=SAMPLE_COUNT)
    args = parser.parse_args()
    path = write_calibration(args.out, args.n)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{path}: {args.n} samples, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
