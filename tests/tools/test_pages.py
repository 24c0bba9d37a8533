"""The generated blocks of README, docs and SECURITY.md are what the code and the kept files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from quota.core.errors import UsageError
from tools.pages import demo, study
from tools.pages.__main__ import blocks
from tools.pages.blocks import fill

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]


WRITTEN = blocks(ROOT) | study.pages(ROOT / study.KEPT)


@pytest.mark.parametrize("page", WRITTEN, ids=str)
def test_pages_are_not_stale(page: Path) -> None:
    text, made = (ROOT / page).read_text(encoding="utf-8"), WRITTEN[page]
    assert text == (made if isinstance(made, str) else fill(text, made, str(page))), "run `python -m tools.pages`"


def test_every_generated_block_has_a_writer_and_the_one_marker() -> None:
    """A block that no command fills would go stale unseen."""
    for page in PAGES:
        named = re.findall(r"<!-- generated:(.*?) -->", page.read_text(encoding="utf-8"))
        made = WRITTEN.get(page.relative_to(ROOT), {})
        names = () if isinstance(made, str) else made
        assert sorted(named) == sorted(f"{name} (python -m tools.pages)" for name in names), page


def test_readme_is_a_front_door() -> None:
    """At most 240 lines and one generated table of at most ten rows; a file or heading that a page links to exists."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 240
    assert re.findall(r"<!-- generated:(\w+)", text) == ["savings", "summary"]
    assert len(blocks(ROOT)[demo.README]["summary"].splitlines()) <= 2 + 10


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
        fill("nothing here", {"figures": "x"}, "README.md")


@pytest.mark.parametrize(("where", "model"), demo._DOCUMENTED)
def test_every_field_of_the_report_is_described(where: str, model: type[BaseModel]) -> None:
    for name, info in model.model_fields.items():
        assert info.description, f"{where}.{name} has no description"
