"""README's generated blocks are what the code and the kept run say."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from quota.core.errors import UsageError
from quota.demo import readme

ROOT = Path(__file__).parents[2]


def test_readme_is_not_stale() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.fill(text, readme.blocks(ROOT / "docs" / "demo")) == text, "run `python -m quota.demo.readme`"


def test_a_missing_block_is_named() -> None:
    with pytest.raises(UsageError, match="generated:figures"):
        readme.fill("nothing here", {"figures": "x"})


@pytest.mark.parametrize(("where", "model"), readme._DOCUMENTED)
def test_every_field_of_the_report_is_described(where: str, model: type[BaseModel]) -> None:
    for name, info in model.model_fields.items():
        assert info.description, f"{where}.{name} has no description"
