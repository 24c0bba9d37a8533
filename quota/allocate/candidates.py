"""Which decoder layers may drop visual tokens: the automatic rule, and the `--layers` text that overrides it.

The rule, for L decoder layers with median attention concentration c_0 .. c_{L-1}:

- the jump is the first layer whose concentration is at least half way from the lowest to the highest value of the first
half
  of the layers (c_0 .. c_{floor(L/2)}): before it text attention is still spread over the image and ranks tokens
  poorly;
- the range starts there, but never before layer 2 (layer 1 when L < 4): a score at layer l reads the attention of layer
l-1,
  and that of layer 0 is not yet about the question;
- it is contiguous, ceil(L/5) layers long and at least 3;
- it ends before the last max(1, L//8) layers, which are left alone.

On profiles with the published shape this gives 2-8 for 32 layers with a jump at 2, and 8-13 for 28 layers with a jump
at 8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from quota.core.errors import UsageError

FIRST = 2  # the published LLaVA-1.5 range skips two layers
JUMP = 0.5  # share of the concentration's span that counts as the jump
SHARE = 5  # one layer in five is a candidate
LEAST = 3
_PART = re.compile(r"^(\d+)(?:-(\d+))?$")


def choose_candidates(concentration: Sequence[float]) -> list[int]:
    """The candidate layers of the rule above, ascending. `concentration` is the median per decoder layer."""
    layers = len(concentration)
    if layers < 2:
        raise UsageError(f"layers: pruning needs a model of at least 2 decoder layers, got {layers}")
    last = layers - 1 - max(1, layers // 8) if layers > 2 else 1
    first = min(FIRST if layers >= 4 else 1, last)
    half = list(concentration[: layers // 2 + 1])
    threshold = min(half) + JUMP * (max(half) - min(half))
    jump = next(i for i, c in enumerate(half) if c >= threshold)
    start = min(max(first, jump), last)
    length = max(LEAST, math.ceil(layers / SHARE))
    return list(range(start, min(start + length, last + 1)))


def parse_layers(text: str, layers: int | None = None) -> list[int]:
    """ "2-6" -> [2, 3, 4, 5, 6]; "2,4,6" -> [2, 4, 6]; both mix. UsageError names the wrong part.

    With `layers`, entries must be decoder layers 1 .. layers-1 (at the input of layer 0 there is no attention to choose
    by).
    """
    chosen: list[int] = []
    for part in text.split(","):
        match = _PART.match(part.strip())
        if match is None:
            raise UsageError(
                f"--layers: expected numbers and ranges such as 2-6 or 2,4,6, got {part.strip()!r} in {text!r}"
            )
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise UsageError(f"--layers: expected a range from low to high, got {part.strip()!r}")
        if high > 10_000:
            raise UsageError(f"--layers: no model has a decoder layer {high}")
        chosen.extend(range(low, high + 1))
    return check_layers(chosen, layers)


def check_layers(chosen: Sequence[int], layers: int | None = None) -> list[int]:
    """The same layers as a list; UsageError unless ascending, distinct, at least 1 and below `layers`."""
    if not chosen:
        raise UsageError("--layers: expected at least one layer, got none")
    for a, b in pairwise(chosen):
        if b <= a:
            raise UsageError(f"--layers: expected ascending, distinct layers, got {b} after {a}")
    if chosen[0] < 1:
        raise UsageError(
            f"--layers: expected layers from 1 on, got {chosen[0]}: no attention has run before decoder"
            " layer 0 to choose by"
        )
    if layers is not None and chosen[-1] >= layers:
        raise UsageError(
            f"--layers: expected layers below {layers} (this model has {layers} decoder layers), got {chosen[-1]}"
        )
    return list(chosen)
