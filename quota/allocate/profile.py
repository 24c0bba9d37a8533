"""What is measured per decoder layer before tokens are allocated: plain numbers, saved as JSON.
`quota.planning.profile` measures them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from quota.core.errors import RecipeError
from quota.core.files import atomic_write_text
from quota.core.keep import significant
from quota.core.recipe import ModelFacts

SCHEMA = "quota-profile/1"
_PER_LAYER = ("concentration_median", "concentration_q25", "concentration_q75", "redundancy_median", "sensitivity")


@dataclass(frozen=True)
class Profile:
    """Per-layer figures of one float model and its quantized counterpart. Tuples have one entry per decoder layer."""

    model: ModelFacts
    regime: str
    samples: int
    calibration_fingerprint: str
    tool_version: str
    concentration_median: tuple[float, ...]  # mass of the 10 largest text -> visual attention shares
    concentration_q25: tuple[float, ...]
    concentration_q75: tuple[float, ...]
    redundancy_median: tuple[float, ...]  # median pairwise cosine similarity of the visual tokens
    sensitivity: tuple[float, ...]  # s_l of equation (1)

    def __post_init__(self) -> None:
        for name in _PER_LAYER:
            values = tuple(significant(float(v)) for v in getattr(self, name))
            if len(values) != self.model.layers:
                raise RecipeError(
                    f"profile.{name}: expected one number per decoder layer ({self.model.layers}), got {len(values)}"
                )
            for i, v in enumerate(values):
                if not math.isfinite(v):
                    raise RecipeError(f"profile.{name}[{i}]: expected a finite number, got {v}")
            object.__setattr__(self, name, values)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self), "model": self.model.model_dump(mode="json")}

    def dumps(self) -> str:
        """Canonical text; equal profiles give equal bytes."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        atomic_write_text(Path(path), self.dumps())

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile file; RecipeError says what is wrong with it."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop("schema") != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}")
            wanted = {f.name for f in fields(cls)}
            if set(data) != wanted:
                raise ValueError(f"expected exactly the fields {', '.join(sorted(wanted))}")
            per_layer: dict[str, Any] = {name: tuple(data.pop(name)) for name in _PER_LAYER}
            return cls(model=ModelFacts.model_validate(data.pop("model")), **data, **per_layer)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise RecipeError(f"profile {path}: cannot be read ({error}); make it again with `quota recipe`") from None
