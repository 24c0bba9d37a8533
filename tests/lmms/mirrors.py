"""Small local copies of the benchmarks' data sets: same folders, columns and types as on the hub, other content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as ImageTokens

ORGANISATION = "lmms-lab-encoder"


def picture(seed: int) -> ImageTokens.Image:
    return ImageTokens.fromarray(np.random.default_rng(seed).integers(0, 255, (40 + seed, 56, 3), dtype=np.uint8))


def features(**columns: Any) -> Features:
    kinds = {
        "text": Value("string"),
        "number": Value("int64"),
        "picture": Image(),
        "pictures": List(Image()),
        "texts": List(Value("string")),
    }
    return Features({name: kinds[kind] for name, kind in columns.items()})


def put(root: Path, name: str, path: str, rows: list[dict[str, Any]], columns: Features) -> None:
    file = root / ORGANISATION / name / path
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=columns).to_parquet(file)


def card(root: Path, name: str, configs: dict[str, tuple[str, str]]) -> None:
    """Declares configuration -> (split, files)."""
    lines = ["---", "configs:"]
    for config, (split, files) in configs.items():
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {files}"]
    (root / ORGANISATION / name / "README.md").write_text("\n".join([*lines, "---", ""]))


def make_pope(root: Path, n: int = 6) -> None:
    rows = [
        {
            "question_id": str(i),
            "question": f"Is there a dog number {i}?",
            "answer": ("yes", "no")[i % 2],
            "image": picture(i),
        }
        for i in range(n)
    ]
    put(
        root,
        "POPE",
        "data/test-00000-of-00001.parquet",
        rows,
        features(question_id="text", question="text", answer="text", image="picture"),
    )


def make_mme(root: Path) -> None:
    """Two pairs of two categories of perception and one pair of cognition."""
    rows = []
    for i, category in enumerate(("existence", "existence", "color", "color", "code_reasoning")):
        for answer in ("Yes", "No"):
            rows.append(
                {
                    "question_id": f"{category}/{i}.png",
                    "question": f"Is it {answer}? Please answer yes or no.",
                    "answer": answer,
                    "category": category,
                    "image": picture(i),
                }
            )
    columns = features(question_id="text", question="text", answer="text", category="text", image="picture")
    put(root, "MME", "data/test-00000-of-00001.parquet", rows, columns)


def make_gqa(root: Path, n: int = 4) -> None:
    """Questions and pictures lie in two configurations; lmms-eval joins them."""
    asked = [
        {"id": str(i), "imageId": f"p{i % 2}", "question": f"What is in place {i}?", "answer": "dog"} for i in range(n)
    ]
    put(
        root,
        "GQA",
        "questions/testdev-0.parquet",
        asked,
        features(id="text", imageId="text", question="text", answer="text"),
    )
    put(
        root,
        "GQA",
        "images/testdev-0.parquet",
        [{"id": f"p{i}", "image": picture(i)} for i in range(2)],
        features(id="text", image="picture"),
    )
    card(
        root,
        "GQA",
        {
            "testdev_balanced_instructions": ("testdev", "questions/*.parquet"),
            "testdev_balanced_images": ("testdev", "images/*.parquet"),
        },
    )


def make_seedbench(root: Path) -> None:
    """One question about a picture, one about three frames."""
    rows = [
        {
            "question_id": str(i),
            "question": "Which one?",
            "answer": "A",
            "data_type": kind,
            "image": [picture(j) for j in range(frames)],
            **{f"choice_{letter}": f"thing {letter}" for letter in "abcd"},
        }
        for i, (kind, frames) in enumerate((("image", 1), ("video", 3), ("image", 1)))
    ]
    letters = {f"choice_{letter}": "text" for letter in "abcd"}
    columns = features(
        question_id="text", question="text", answer="text", data_type="text", image="pictures", **letters
    )
    put(root, "SEED-Bench", "data/test-0.parquet", rows, columns)


def make_scienceqa(root: Path, n: int = 3) -> None:
    rows = [
        {
            "question": "Which?",
            "hint": "" if i else "Look.",
            "choices": ["this", "that"],
            "answer": i % 2,
            "image": picture(i),
        }
        for i in range(n)
    ]
    put(
        root,
        "ScienceQA",
        "img/test-0.parquet",
        rows,
        features(question="text", hint="text", choices="texts", answer="number", image="picture"),
    )
    card(root, "ScienceQA", {"ScienceQA-IMG": ("test", "img/*.parquet")})


def make_mmbench(root: Path) -> None:
    """Two questions, the first also in a rotated form: right only when both are."""
    rows = [
        {
            "index": index,
            "question": "Which?",
            "hint": "nan",
            "answer": answer,
            "category": "attribute",
            "L2-category": "coarse",
            "source": "made",
            "split": "dev",
            "A": "red",
            "B": "blue",
            "C": "nan",
            "D": "nan",
            "image": picture(place),
        }
        for place, (index, answer) in enumerate(((7, "A"), (1_000_007, "B"), (8, "A")))
    ]
    words = dict.fromkeys(
        ("question", "hint", "answer", "category", "L2-category", "source", "split", "A", "B", "C", "D"), "text"
    )
    put(root, "MMBench", "en/dev-0.parquet", rows, features(index="number", image="picture", **words))
    card(root, "MMBench", {"en": ("dev", "en/*.parquet")})


def make_all(root: Path) -> None:
    for make in (make_pope, make_mme, make_gqa, make_seedbench, make_scienceqa, make_mmbench):
        make(root)
