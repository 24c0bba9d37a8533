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
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from quota.core.documents import read_text, shown
from quota.core.errors import RecipeError
from quota.core.files import atomic_write_text
from quota.core.formats import FLOAT, SCHEMES
from quota.core.keep import POSITION_POLICIES, REFERENCES, kept_tokens, significant
from quota.core.methods import METHODS, method_words, withdrawing
from quota.core.recipe_file import MOST_BYTES, canonical, describe, digest, is_version_1, read_document
from quota.core.schema import Document
from quota.core.selection import (
    DEFAULT_SELECTION,
    Kept,
    Layers,
    Percentiles,
    Positive,
    ScoreWeights,
    Selection,
    Tokens,
    Weight,
    one_of,
)
from quota.core.selectors import attention_free

SCHEMA_VERSION = 2
UPGRADE = "rewrite the file with `quota recipe upgrade`"
_SCHEMA_TITLE = "QUOTA recipe"
SCHEMA_PATH = Path("recipes/recipe.schema.json")


def _from_zero(layer: int) -> int:
    if layer < 0:
        raise ValueError(
            "expected a decoder layer from 0 on, where 0 is before the language model (-1 was, in schema_version 1:"
            f" {UPGRADE})"
        )
    return layer


def _known_scheme(name: str) -> str:
    if name not in (FLOAT.name, *SCHEMES):
        raise ValueError(f"expected one of {', '.join((FLOAT.name, *SCHEMES))}")
    return name


Candidate = Annotated[int, Field(strict=True, json_schema_extra={"minimum": 0}), AfterValidator(_from_zero)]
Regime = Annotated[
    str, Field(strict=True, json_schema_extra={"enum": [FLOAT.name, *SCHEMES]}), AfterValidator(_known_scheme)
]


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

    A candidate drops at the input of its decoder layer; candidate 0 among the merged embeddings, before the language
    model.

    Immutable; sequences are tuples. Build one with `Recipe.parse` or `Recipe.load`, which raise RecipeError naming the
    field.
    """

    schema_version: Literal[2] = 2
    method: Annotated[str, one_of(method_words)]
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
            "decoder layers that drop tokens at their input, ascending; what enters layer 0 are the merged embeddings"
        ),
    )
    keep: tuple[Kept, ...] = Field(
        min_length=1,
        description="share of the reference tokens kept per candidate, non-increasing; 0 withdraws all",
    )
    final_keep: Kept = Field(description="r_min: the last entry of keep")
    tau: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), AfterValidator(significant)] = Field(
        default=1.0, description="softmax temperature of equation (3)"
    )
    reference: Annotated[str, one_of(lambda: REFERENCES)] = "recorded"
    reference_tokens: Tokens = Field(description="V_ref: visual tokens of one image that keep refers to")
    selections: tuple[Selection, ...] = Field(
        default=(),
        description="how each candidate chooses; empty: all by the quota score and topk; one entry: all by that one",
    )
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = Field(default=0, description="of the random score")
    weights: ScoreWeights = Field(default_factory=ScoreWeights)
    percentiles: Percentiles = Field(default_factory=Percentiles)
    position_policy: Annotated[str, one_of(lambda: POSITION_POLICIES)] = "original"
    sensitivities: tuple[Weight, ...] = Field(
        default=(), description="s_l of equation (1) per candidate; empty when unknown"
    )
    provenance: Provenance = Field(default_factory=Provenance)

    @field_validator("schema_version", mode="before")
    @classmethod
    def _version(cls, value: object) -> object:
        if value != SCHEMA_VERSION or isinstance(value, bool):
            remedy = UPGRADE if is_version_1(value) else "make the recipe again with `quota recipe`"
            raise ValueError(f"this quota reads recipes of schema_version {SCHEMA_VERSION}; {remedy}")
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
        if 0 in self.keep and not (self.method in METHODS and METHODS[self.method].withdraws):
            raise ValueError(
                f"keep: expected ratios greater than 0, entry {self.keep.index(0)} is 0: only method {withdrawing()}"
                " withdraws every visual token"
            )
        first = self.selection_at(self.candidates[0])
        if self.candidates[0] == 0 and first.needs & {"attention", "own_attention"}:
            raise ValueError(
                "selections: candidate 0 runs before any attention: expected score"
                f" {', '.join(attention_free())}, got {first.score!r}"
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
            raise RecipeError(f"{source}: {describe(error)}") from None

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file. RecipeError when it is missing, not JSON, has a repeated key, or breaks the schema."""
        data = read_document(path)
        return cls.parse(data, f"recipe {path}")

    def dumps(self) -> str:
        """Canonical text; equal recipes give equal bytes."""
        return canonical(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """Names the recipe in the manifest of a checkpoint calibrated under it."""
        return digest(self.model_dump(mode="json"))

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
