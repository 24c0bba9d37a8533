"""The recipe: which decoder layers drop visual tokens, how many stay, and where those numbers came from.

A versioned JSON file; `Recipe` is its only reader and writer. Floats are rounded to 6 significant digits when a recipe
is made, so a recipe in memory equals the file it is saved to, byte for byte. `python -m quota.core.recipe` writes the
JSON schema.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from quota.core.documents import read_text, shown
from quota.core.errors import RecipeError
from quota.core.files import atomic_write_text
from quota.core.formats import FLOAT, SCHEMES
from quota.core.keep import ATTENTION_SCORES, BEFORE, kept_tokens, significant
from quota.core.schema import Document

SCHEMA_VERSION = 1
_MOST_ERRORS = 8
_SCHEMA_TITLE = "QUOTA recipe"
SCHEMA_PATH = Path("recipes/recipe.schema.json")

MOST_BYTES = 4 * 1024**2  # a recipe of 1024 candidates has a tenth of that

# Bounds far above any model: a damaged number must not take memory or time.
Positive = Annotated[int, Field(strict=True, ge=1, le=2**31)]
Layers = Annotated[int, Field(strict=True, ge=1, le=1024)]
Tokens = Annotated[int, Field(strict=True, ge=1, le=2**20)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), AfterValidator(significant)]
Share = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False), AfterValidator(significant)]
Weight = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), AfterValidator(significant)]
Signal = Annotated[float, Field(strict=True, ge=0, le=1000, allow_inf_nan=False), AfterValidator(significant)]
Kept = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False), AfterValidator(significant)]


def _not_zero(layer: int) -> int:
    if layer == 0:
        raise ValueError(
            "expected -1 (before the language model) or a decoder layer from 1 on: what enters layer 0 is candidate -1"
        )
    return layer


def _known_scheme(name: str) -> str:
    if name not in (FLOAT.name, *SCHEMES):
        raise ValueError(f"expected one of {', '.join((FLOAT.name, *SCHEMES))}")
    return name


Candidate = Annotated[
    int, Field(strict=True, ge=BEFORE, json_schema_extra={"not": {"const": 0}}), AfterValidator(_not_zero)
]
Regime = Annotated[
    str, Field(strict=True, json_schema_extra={"enum": [FLOAT.name, *SCHEMES]}), AfterValidator(_known_scheme)
]
Method = Literal[
    "quota", "uniform", "fastv", "pyramiddrop", "vtw", "divprune", "cdpruner", "random", "grid", "fitprune", "custom"
]
Score = Literal["quota", "text", "last_token", "own_last_token", "cross_self", "relevance", "random", "none"]
Policy = Literal["topk", "mmr", "maxmin", "dpp", "grid"]


class ModelFacts(Document):
    """The model a recipe belongs to. The sizes from hidden_size on let the cost model run without the model; null when
    unknown."""

    architecture: str = Field(description="class name, for example LlavaForConditionalGeneration")
    fingerprint: str = Field(
        description="fingerprint shared by the float model and its quantized checkpoint; a mismatch is an error"
    )
    layers: Layers = Field(description="number of decoder layers")
    visual_tokens: Tokens = Field(description="visual tokens of one image after the projector")
    hidden_size: Positive | None = Field(default=None, description="d of the cost model")
    kv_size: Positive | None = Field(
        default=None, description="d_kv of the cost model: key/value heads x head dimension"
    )
    intermediate_size: Positive | None = Field(default=None, description="m of the cost model: width of the gated MLP")
    head_dim: Positive | None = Field(default=None, description="head dimension of the language model")
    text_tokens: Positive | None = Field(
        default=None, description="T_text of the cost model: text tokens of a typical prompt"
    )
    vision_macs: Annotated[int, Field(strict=True, ge=1, le=2**53)] | None = Field(
        default=None, description="multiply-accumulates of vision tower and projector for one image"
    )


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

    Every policy is deterministic and ties go to the lower index.
    """

    score: Score = Field(
        default="quota",
        description=(
            "quota: equation (8); text: mean attention of the text after the image in the layer before; last_token:"
            " attention of the last prompt token in the layer before (FastV); own_last_token: the same under the"
            " candidate's own projections (PyramidDrop); cross_self: largest head of the attention from text times that"
            " from visual tokens (FitPrune); relevance: mean cosine to the word embeddings after the image; random: a"
            " hash of seed, image and place; none: zeros"
        ),
    )
    policy: Policy = Field(
        default="topk",
        description=(
            "topk: the largest scores; mmr: greedy, score against the cosine to what is already kept; maxmin: greedy,"
            " farthest in cosine from what is already kept (DivPrune, no score); dpp: greedy maximum of the determinant"
            " of score x cosine x score (CDPruner); grid: a part of the budget spread evenly over the image, the rest"
            " by score"
        ),
    )
    mmr_score: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False), AfterValidator(significant)] = (
        Field(default=0.5, description="mmr: lambda, the weight of the score; the cosine has 1 - lambda")
    )
    grid_share: Share = Field(default=1.0, description="grid: share of the budget that is spread evenly")


DEFAULT_SELECTION = Selection()


class Provenance(Document):
    """Where the numbers came from. Everything is null in a recipe written by hand."""

    model_fingerprint: str | None = None
    calibration_fingerprint: str | None = Field(default=None, description="fingerprint of the samples file")
    tool_version: str | None = None
    samples: Positive | None = Field(default=None, description="number of profiled samples")
    layer_rule: str | None = Field(
        default=None, description='how the candidates were chosen: "auto" or the --layers text'
    )
    search: tuple[str, ...] = Field(default=(), description="what the method's own search found, one sentence each")


class Recipe(Document):
    """One pruning plan. `keep[i]` is the share of the reference visual tokens alive from decoder layer `candidates[i]`
    on.

    Candidate -1 drops before the language model; decoder layer 0 then runs on what is left.

    Immutable; sequences are tuples. Build one with `Recipe.parse` or `Recipe.load`, which raise RecipeError naming the
    field.
    """

    schema_version: Literal[1] = 1
    method: Method = Field(
        description=(
            "quota: drops follow the sensitivities; uniform: equal drops; custom: written by hand; else a published"
            " method"
        )
    )
    regime: Regime = Field(
        description=(
            "regime the recipe was made under; a record, not a condition: a recipe runs on the float model and on any"
            " checkpoint of it"
        )
    )
    model: ModelFacts
    candidates: tuple[Candidate, ...] = Field(
        min_length=1,
        description=(
            "decoder layers that drop tokens at their input, ascending; -1 is before the language model, 0 does not"
            " exist"
        ),
    )
    keep: tuple[Kept, ...] = Field(
        min_length=1, description="share of the reference tokens kept per candidate, non-increasing; 0 only for vtw"
    )
    final_keep: Kept = Field(description="r_min: the last entry of keep")
    tau: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), AfterValidator(significant)] = Field(
        default=1.0, description="softmax temperature of equation (3)"
    )
    reference: Literal["recorded", "per_image"] = Field(
        default="recorded",
        description="recorded: budgets count reference_tokens per image; per_image: the prompt's own visual tokens",
    )
    reference_tokens: Tokens = Field(description="V_ref: visual tokens of one image that keep refers to")
    selections: tuple[Selection, ...] = Field(
        default=(),
        description="how each candidate chooses; empty: all by the quota score and topk; one entry: all by that one",
    )
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = Field(default=0, description="of the random score")
    weights: ScoreWeights = Field(default_factory=ScoreWeights)
    percentiles: Percentiles = Field(default_factory=Percentiles)
    position_policy: Literal["original", "compact"] = Field(
        default="original",
        description="original: kept tokens keep their rotary positions; compact: positions are renumbered",
    )
    sensitivities: tuple[Weight, ...] = Field(
        default=(), description="s_l of equation (1) per candidate; empty when unknown"
    )
    provenance: Provenance = Field(default_factory=Provenance)

    @field_validator("schema_version", mode="before")
    @classmethod
    def _version(cls, value: object) -> object:
        if value != SCHEMA_VERSION or isinstance(value, bool):
            raise ValueError(
                f"this quota reads recipes of schema_version {SCHEMA_VERSION}; make the recipe again with `quota"
                " recipe`"
            )
        return value

    @field_validator("candidates")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        for i, (a, b) in enumerate(pairwise(value), start=1):
            if b <= a:
                raise ValueError(f"layers must be ascending and distinct, entry {i} is {b} after {a}")
        return value

    @field_validator("keep")
    @classmethod
    def _non_increasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for i, (a, b) in enumerate(pairwise(value), start=1):
            if b > a:
                raise ValueError(
                    f"ratios must not increase, entry {i} is {b:g} after {a:g}: a dropped token cannot come back"
                )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if len(self.selections) not in (0, 1, len(self.candidates)):
            raise ValueError(
                f"selections: expected none, one for all, or one per candidate ({len(self.candidates)}), got"
                f" {len(self.selections)}"
            )
        if self.method != "vtw" and 0 in self.keep:
            raise ValueError(
                f"keep: expected ratios greater than 0, entry {self.keep.index(0)} is 0: only method vtw withdraws"
                " every visual token"
            )
        first = self.selection_at(self.candidates[0])
        if self.candidates[0] == BEFORE and first.score in (ATTENTION_SCORES | {"own_last_token"}):
            raise ValueError(
                "selections: candidate -1 runs before any attention: expected score relevance, random or none, got"
                f" {first.score!r}"
            )
        if len(self.keep) != len(self.candidates):
            raise ValueError(
                f"keep: expected one ratio per candidate layer ({len(self.candidates)}), got {len(self.keep)}"
            )
        if self.sensitivities and len(self.sensitivities) != len(self.candidates):
            raise ValueError(
                f"sensitivities: expected none or one per candidate layer ({len(self.candidates)}), got"
                f" {len(self.sensitivities)}"
            )
        if self.keep[-1] != self.final_keep:
            raise ValueError(
                f"keep: expected the last ratio to equal final_keep {self.final_keep:g}, got {self.keep[-1]:g}"
            )
        if self.candidates[-1] >= self.model.layers:
            raise ValueError(
                f"candidates: expected layers below model.layers {self.model.layers}, got {self.candidates[-1]}"
            )
        made_for = self.provenance.model_fingerprint
        if made_for is not None and made_for != self.model.fingerprint:
            raise ValueError(
                f"provenance.model_fingerprint: expected model.fingerprint {self.model.fingerprint}, got {made_for}"
            )
        return self

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """A recipe from its JSON object. RecipeError lists every wrong field with what was expected and found."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise RecipeError(_describe(error, source)) from None

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file. RecipeError when it is missing, not JSON, has a repeated key, or breaks the schema."""
        path = Path(path)
        try:
            text = read_text(path, MOST_BYTES)
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"recipe {path}: cannot be read ({_reason(error)}); expected a file written by `quota recipe`"
            ) from None
        try:
            data = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise RecipeError(
                f"recipe {path}: not valid JSON ({error}); expected a file written by `quota recipe`"
            ) from None
        if not isinstance(data, dict):
            raise RecipeError(f"recipe {path}: expected a JSON object, got {type(data).__name__}")
        return cls.parse(data, f"recipe {path}")

    def dumps(self) -> str:
        """Canonical text: fields in schema order, two-space indent, one final newline. Equal recipes give equal
        bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write atomically: a reader sees the old file or the new one, never a part."""
        atomic_write_text(Path(path), self.dumps())

    def selection_at(self, candidate: int) -> Selection:
        """How this candidate chooses."""
        if len(self.selections) > 1:
            return self.selections[self.candidates.index(candidate)]
        return self.selections[0] if self.selections else DEFAULT_SELECTION

    def keep_at(self, layer: int) -> float:
        """Share of the reference visual tokens alive inside decoder layer `layer` (0-based); 1.0 before the first
        candidate."""
        if not 0 <= layer < self.model.layers:
            raise RecipeError(f"layer: expected 0 to {self.model.layers - 1}, got {layer}")
        alive = 1.0
        for candidate, ratio in zip(self.candidates, self.keep, strict=True):
            if candidate <= layer:
                alive = ratio
        return alive

    def tokens_at(self, layer: int, tokens: int | None = None) -> int:
        """Visual tokens of one image alive inside `layer`: ceil(keep * V), with V = `tokens` or
        `reference_tokens`."""
        return kept_tokens(self.keep_at(layer), self.reference_tokens if tokens is None else tokens)

    def check_model(self, fingerprint: str, layers: int | None = None, architecture: str | None = None) -> None:
        """RecipeError unless the recipe was made for this model; layers, architecture (class name): compared where they
        are given."""
        if fingerprint != self.model.fingerprint:
            raise RecipeError(
                f"model.fingerprint: the recipe is for {self.model.architecture} {self.model.fingerprint}, this model"
                f" is {fingerprint}; make a recipe for this model with `quota recipe`"
            )
        if layers is not None and layers != self.model.layers:
            raise RecipeError(
                f"model.layers: the recipe expects {self.model.layers} decoder layers, this model has {layers}"
            )
        if architecture is not None and architecture != self.model.architecture:
            raise RecipeError(
                f"model.architecture: the recipe is for {shown(self.model.architecture)}, this model is"
                f" {architecture!r}"
            )


def _describe(error: ValidationError, source: str) -> str:
    lines = []
    found_errors = error.errors(include_url=False)
    for item in found_errors[:_MOST_ERRORS]:
        field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in item["loc"]).lstrip(".")
        found = item["input"]
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown field; check its spelling against recipes/recipe.schema.json"
        elif item["type"] == "missing":
            message = "required field is missing"
        elif not isinstance(found, (dict, list, tuple, BaseModel)):
            message = f"{message[:1].lower()}{message[1:]}, got {shown(found)}"
        field = field if len(field) <= 80 else f"{field[:80]}..."
        lines.append(f"{field}: {message}" if field else message)
    if len(found_errors) > _MOST_ERRORS:
        lines.append(f"{len(found_errors) - _MOST_ERRORS} more")
    return f"{source}: " + "; ".join(lines)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        repeated = next(key for i, (key, _) in enumerate(pairs) if key in {k for k, _ in pairs[:i]})
        raise ValueError(f"key {repeated!r} appears twice")
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def schema_text() -> str:
    """The JSON schema of a recipe file, canonical text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    schema["title"] = _SCHEMA_TITLE
    return json.dumps(schema, indent=2) + "\n"


def is_schema(path: Path) -> bool:
    """Whether a file is `schema_text()`. RecipeError for the recipe schema of another version."""
    try:
        text = read_text(path, MOST_BYTES)
        found = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or found.get("title") != _SCHEMA_TITLE or "$schema" not in found:
        return False
    if text != schema_text():
        raise RecipeError(
            f"{path}: this is the recipe schema of another version; write this one's by `python -m quota.core.recipe"
            f" --out {path}`"
        )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the JSON schema of recipe files.")
    parser.add_argument("--out", type=Path, default=SCHEMA_PATH, help=f"default: {SCHEMA_PATH}")
    out = parser.parse_args().out
    atomic_write_text(out, schema_text())
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
