"""The generated blocks of README and docs are what the code and the kept run say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from quota.core.errors import UsageError
from quota.demo import readme

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("path", readme.blocks(ROOT / "docs" / "demo"), ids=str)
def test_pages_are_not_stale(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert readme.fill(text, readme.blocks(ROOT / "docs" / "demo")[path], str(path)) == text, (
        "run `python -m quota.demo.readme`"
    )


def test_readme_is_a_front_door() -> None:
    """At most 240 lines and one generated table of at most ten rows; a file or heading that a page links to exists."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 240
    assert re.findall(r"<!-- generated:(\w+)", text) == ["savings", "summary"]
    assert len(readme.blocks(ROOT / "docs" / "demo")[readme.README]["summary"].splitlines()) <= 2 + 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name}: {target}"


def anchors(text: str) -> set[str]:
    """The fragments GitHub gives to a page's headings."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_a_missing_block_is_named() -> None:
    with pytest.raises(UsageError, match="generated:figures"):
        readme.fill("nothing here", {"figures": "x"}, "README.md")


@pytest.mark.parametrize(("where", "model"), readme._DOCUMENTED)
def test_every_field_of_the_report_is_described(where: str, model: type[BaseModel]) -> None:
    for name, info in model.model_fields.items():
        assert info.description, f"{where}.{name} has no description"
