"""How a candidate of a recipe chooses: names of a score and a policy, and the numbers they read; and the kinds of
number that recipes are made of.

Floats are rounded to 6 significant digits when a document is made, so what is in memory equals the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from quota.core.errors import RecipeError
from quota.core.keep import significant
from quota.core.schema import Document
from quota.core.selectors import POLICIES, SCORES, Need, needs_of

# Bounds far above any model: a damaged number must not take memory or time.
Positive = Annotated[int, Field(strict=True, ge=1, le=2**31)]
Layers = Annotated[int, Field(strict=True, ge=1, le=1024)]
Tokens = Annotated[int, Field(strict=True, ge=1, le=2**20)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), AfterValidator(significant)]
Share = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False), AfterValidator(significant)]
Weight = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), AfterValidator(significant)]
Signal = Annotated[float, Field(strict=True, ge=0, le=1000, allow_inf_nan=False), AfterValidator(significant)]
Kept = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False), AfterValidator(significant)]


@dataclass(frozen=True)
class one_of:
    """A name of a table, for a pydantic field: `words()` maps each name to what it means. The table is read when a
    value is checked and when the schema is written, so a row is all that a new name needs."""

    words: Callable[[], Mapping[str, str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, core_schema.str_schema(strict=True))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        words = self.words()
        told = "; ".join(f"{name}: {meaning}" for name, meaning in words.items())
        return {"type": "string", "enum": list(words), "description": told}

    def _known(self, name: str) -> str:
        if name not in (known := self.words()):
            raise ValueError(f"expected one of {', '.join(map(repr, known))}")
        return name


class ScoreWeights(Document):
    """Equation (8): weights of the four robustly scaled signals of a visual token.

    Only their ratios matter, since scores only rank: large weights are odd but harmless.
    """

    inter: Signal = Field(default=0.45, description="attention from the text after the image")
    mag: Signal = Field(default=0.25, description="norm of the hidden state")
    intra: Signal = Field(default=0.10, description="attention from visual tokens")
    quant: Annotated[float, Field(strict=True, ge=-1000, le=1000, allow_inf_nan=False), AfterValidator(significant)] = (
        Field(
            default=0.20,
            description=(
                "error of the deployed activation quantizer: the low-bit risk; below 0 prefers tokens that quantize"
                " well"
            ),
        )
    )

    @model_validator(mode="after")
    def _some_signal(self) -> ScoreWeights:
        if self.inter + self.mag + self.intra + abs(self.quant) <= 0:
            raise ValueError("at least one weight must be greater than 0")
        return self

    def without_quant(self) -> ScoreWeights:
        """The stage-wise baselines' score: no low-bit term, the others rescaled to the same sum."""
        total = self.inter + self.mag + self.intra
        if total <= 0:
            raise RecipeError(
                "weights: expected a weight other than quant above 0 to drop the quant term; give inter, mag or intra a"
                " weight"
            )
        factor = (total + max(self.quant, 0.0)) / total
        return ScoreWeights(inter=self.inter * factor, mag=self.mag * factor, intra=self.intra * factor, quant=0.0)


class Percentiles(Document):
    """Equation (7): the percentiles that robust scaling maps to 0 and 1."""

    low: Number = 5.0
    high: Number = 95.0

    @model_validator(mode="after")
    def _ordered(self) -> Percentiles:
        if not 0 <= self.low < self.high <= 100:
            raise ValueError(f"expected 0 <= low < high <= 100, got low {self.low:g} and high {self.high:g}")
        return self


class Selection(Document):
    """How a candidate chooses: a score per visual token, and a policy that turns scores into a set of the size of the
    budget.

    Every policy is deterministic and ties go to the lower index. The names and words are those of
    `quota.core.selectors`.
    """

    score: Annotated[str, one_of(lambda: {name: row.words for name, row in SCORES.items()})] = "quota"
    policy: Annotated[str, one_of(lambda: {name: row.words for name, row in POLICIES.items()})] = "topk"
    mmr_score: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False), AfterValidator(significant)] = (
        Field(default=0.5, description="mmr: lambda, the weight of the score; the cosine has 1 - lambda")
    )
    grid_share: Share = Field(default=1.0, description="grid: share of the budget that is spread evenly")

    @property
    def needs(self) -> frozenset[Need]:
        return needs_of(self.score, self.policy)


DEFAULT_SELECTION = Selection()
