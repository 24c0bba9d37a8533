"""Generated blocks of Markdown files: text between two markers that a command writes and a test compares."""

from __future__ import annotations

import re

from quota.core.errors import UsageError


def fill(text: str, blocks: dict[str, str], where: str) -> str:
    """Replace what stands between `<!-- generated:NAME ... -->` and `<!-- end:NAME -->`; UsageError when a block is
    missing."""
    for name, content in blocks.items():
        pattern = re.compile(rf"(<!-- generated:{name}[^>]*-->\n).*?(<!-- end:{name} -->)", re.DOTALL)
        found = pattern.search(text)
        if not found:
            raise UsageError(f"{where}: no block generated:{name}")
        text = f"{text[: found.start()]}{found[1]}{content}\n{found[2]}{text[found.end() :]}"
    return text
