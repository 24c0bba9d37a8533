"""Fill every generated block of README, docs and SECURITY.md: `python -m tools.pages [--demo DIR] [--study DIR]`.

A block is written from kept files alone: demo runs in docs/demo, studies in docs/tables, measurements in
benchmarks/results, and the models that write `report.json`. With --demo and --study a finished run is kept first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quota.core.errors import QuotaError
from quota.core.files import atomic_write_text
from tools.pages import demo, measured, study
from tools.pages.blocks import fill

ROOT = Path(__file__).resolve().parents[2]


def blocks(root: Path = ROOT) -> dict[Path, dict[str, str]]:
    """Page -> block name -> text, of all writers."""
    pages: dict[Path, dict[str, str]] = {}
    for made in (
        demo.blocks(root / demo.KEPT),
        study.blocks(root / study.KEPT),
        measured.blocks(root / measured.RESULTS),
    ):
        for page, texts in made.items():
            pages.setdefault(page, {}).update(texts)
    return pages


def write(root: Path = ROOT) -> list[Path]:
    """Fill every block and write the pages that are generated whole; returns the pages."""
    made = {
        page: fill((root / page).read_text(encoding="utf-8"), texts, str(page)) for page, texts in blocks(root).items()
    }
    made |= study.pages(root / study.KEPT)
    for page, text in made.items():
        atomic_write_text(root / page, text)
    return list(made)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, metavar="DIR", help="keep this finished `quota demo` first")
    parser.add_argument("--study", type=Path, metavar="DIR", help="keep this folder of finished studies first")
    given = parser.parse_args()
    try:
        for source, writer in ((given.demo, demo), (given.study, study)):
            if source is not None:
                print(f"kept {writer.keep(source, ROOT / writer.KEPT)}")
        for page in write():
            print(f"filled {page}")
    except (QuotaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
