"""The pages of tables are what the kept reports say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quota.core.errors import UsageError
from quota.demo.embedded import FAMILIES
from quota.report.blocks import fill
from quota.study import readme

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "tables"


def test_results_are_not_stale() -> None:
    text = (ROOT / readme.RESULTS).read_text(encoding="utf-8")
    assert fill(text, {"tables": readme.block(KEPT)}, str(readme.RESULTS)) == text, "run `python -m quota.study.readme`"


@pytest.mark.parametrize("family", FAMILIES)
def test_pages_are_not_stale(family: str) -> None:
    written = KEPT / f"{family}.md"
    assert written.exists() == bool(readme.reports(family, KEPT))
    if written.exists():
        assert readme.page(family, KEPT) == written.read_text(encoding="utf-8"), "run `python -m quota.study.readme`"


def test_pictures_of_a_page_are_beside_it() -> None:
    for family in FAMILIES:
        for report in readme.reports(family, KEPT).values():
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
        readme.keep(source, tmp_path / "kept")
    (source / "keep.json").write_text(json.dumps({"study": "keep", "family": "llava", "files": {"plot": "keep.png"}}))
    (source / "keep.png").write_bytes(b"png")
    assert readme.keep(source, tmp_path / "kept") == [tmp_path / "kept" / "llava" / "keep.json"]
    assert (tmp_path / "kept" / "llava" / "keep.png").read_bytes() == b"png" and list(
        readme.reports("llava", tmp_path / "kept")
    ) == ["keep"]
