"""The pages of tables are what the kept reports say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quota.core.errors import UsageError
from quota.demo.embedded import FAMILIES
from tools.pages import study

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "tables"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_a_page_where_studies_are_kept(family: str) -> None:
    assert (KEPT / f"{family}.md").exists() == bool(study.reports(family, KEPT))


def test_pictures_of_a_page_are_beside_it() -> None:
    for family in FAMILIES:
        for report in study.reports(family, KEPT).values():
            named = (
                [report["files"]["plot"]]
                if "plot" in report["files"]
                else [a["overlay"] for a in report["methods"].values()]
            )
            assert all((KEPT / family / name).read_bytes()[:4] == b"\x89PNG" for name in named)


def test_keep_copies_reports_with_their_pictures(tmp_path: Path) -> None:
    source = tmp_path / "out"
    source.mkdir()
    with pytest.raises(UsageError, match="expected at least one report"):
        study.keep(source, tmp_path / "kept")
    (source / "keep.json").write_text(json.dumps({"study": "keep", "family": "llava", "files": {"plot": "keep.png"}}))
    (source / "keep.png").write_bytes(b"png")
    assert study.keep(source, tmp_path / "kept") == [tmp_path / "kept" / "llava" / "keep.json"]
    assert (tmp_path / "kept" / "llava" / "keep.png").read_bytes() == b"png" and list(
        study.reports("llava", tmp_path / "kept")
    ) == ["keep"]
