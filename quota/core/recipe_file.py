"""A recipe file as a JSON object: reading, with errors for hand-written ones, and finding the version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from quota.core.documents import read_text, shown
from quota.core.errors import RecipeError

MOST_BYTES = 4 * 1024**2  # a recipe of 1024 candidates has a tenth of that
_MOST_ERRORS = 8


def read_document(path: str | Path) -> dict[str, Any]:
    """The object in a recipe file. RecipeError when it is missing, not JSON, no object, or has a repeated key."""
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
    return data


def is_version_1(value: object) -> bool:
    """Whether that is the schema_version of the recipes in which candidate -1 was before the language model."""
    return value == 1 and not isinstance(value, bool)


def canonical(document: Mapping[str, Any]) -> str:
    """The text of a recipe file: fields in schema order, two-space indent, one final newline."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest(document: Mapping[str, Any]) -> str:
    """sha256 of the canonical text: names the recipe in the manifest of a checkpoint calibrated under it."""
    return "sha256:" + hashlib.sha256(canonical(document).encode()).hexdigest()


def describe(error: ValidationError) -> str:
    """Every wrong field with what was expected and found, in one line."""
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
    return "; ".join(lines)


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
