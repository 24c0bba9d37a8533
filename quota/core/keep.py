"""Keep ratios: what they count, how the kept tokens are numbered, and their arithmetic. No pydantic, which the
inference path does without."""

from __future__ import annotations

import math
from fractions import Fraction

REFERENCES: dict[str, str] = {
    "recorded": "budgets count reference_tokens per image",
    "per_image": "the prompt's own visual tokens",
    "per_tile": "those of each tile of an image by themselves",
}
POSITION_POLICIES: dict[str, str] = {
    "original": "kept tokens keep their rotary positions",
    "compact": "positions are renumbered",
}


def significant(x: float, digits: int = 6) -> float:
    """`x` rounded to `digits` significant decimal digits. Monotone, so it never breaks an ordering."""
    return float(f"{x:.{digits}g}")


def kept_tokens(ratio: float, tokens: int) -> int:
    """Equation (5): ceil(ratio * tokens), computed on the decimal value of `ratio`, so 0.07 of 100 is 7 and 0.3 of 576
    is 173."""
    return math.ceil(Fraction(repr(float(ratio))) * tokens)


def keep_of(count: int, tokens: int) -> float:
    """The ratio, 6 significant digits, for which `kept_tokens(ratio, tokens)` is exactly `count` (0 .. tokens; tokens
    below 200 000)."""
    ratio = significant(count / tokens)
    return ratio if kept_tokens(ratio, tokens) == count else significant((count - 0.5) / tokens)
