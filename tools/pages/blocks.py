"""Generated blocks of Markdown files: text between two markers that a command writes and a test compares."""

from __future__ import annotations

import re

from quota.core.errors import UsageError

MARKER = "<!-- generated:%s (python -m tools.pages) -->"


def fill(text: str, blocks: dict[str, str], where: str) -> str:
    """Replace what stands between `MARKER % NAME` and `<!-- end:NAME -->`; UsageError when a block is missing."""
    for name, content in blocks.items():
        begin, end = re.escape(MARKER % name), re.escape(f"<!-- end:{name} -->")
        pattern = re.compile(rf"({begin}\n).*?({end})", re.DOTALL)
        found = pattern.search(text)
        if not found:
            raise UsageError(f"{where}: no block generated:{name}")
        text = f"{text[: found.start()]}{found[1]}{content}\n{found[2]}{text[found.end() :]}"
    return text
