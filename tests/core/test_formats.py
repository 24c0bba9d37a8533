"""The tables of formats and schemes, and that no other room repeats what they say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quota.calib.settings import METHODS
from quota.core.formats import (
    FLOAT,
    INT4,
    INT4_GROUPS,
    KV4,
    KV16,
    SCHEMES,
    Format,
    scheme_made_by,
    scheme_named,
)
from quota.models.quantize import linear_class
from quota.nn.linear import SchemeLinear
from quota.quant.affine import quantize_kv, quantize_symmetric
from quota.quant.grouped import round_groups

PACKAGE = Path(__file__).parents[2] / "quota"
# Rooms that compute with codes; a literal there with one of these values would be a format's number once more.
COMPUTING = ("quant", "ops", "nn", "models", "calib", "runtime", "prune", "allocate", "eval")
NUMBERS = (7, 15, 128)


@pytest.mark.parametrize(
    ("form", "codes", "steps", "row", "vector"),
    [
        (INT4, (-8, 7), 7, 7, 11),
        (INT4_GROUPS, (0, 15), 15, 7, 12),
        (KV4, (0, 15), 15, 7, 15),
        (Format(8, stored_bits=8, symmetric=True), (-128, 127), 127, 13, 17),
        (Format(3, symmetric=True), (-4, 3), 3, 7, 11),
        (Format(4, group=4, zero="code", symmetric=True), (0, 15), 7, 7, 7 + 4 * 5),
    ],
)
def test_numbers_of_a_format(form, codes, steps, row, vector):
    assert (form.low, form.high) == codes and form.steps == steps
    assert form.code_bytes(13) == row and form.vector_bytes(13) == vector


def test_floats_are_their_own_codes():
    assert (KV16.dtype, KV16.words(), KV16.code_bytes(13), KV16.vector_bytes(13)) == ("float16", "float16", 26, 26)


def test_codes_stay_inside_the_format_and_reach_its_ends():
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4):
        signed, kv, grouped = (
            Format(bits, symmetric=True),
            Format(bits, zero="value"),
            Format(bits, group=32, zero="code"),
        )
        made = {
            signed: quantize_symmetric(x, 0.5, signed),
            kv: quantize_kv(x, 1.0, kv),
            grouped: round_groups(x, grouped),
        }
        for form, (q, *_) in made.items():
            assert (int(q.min()), int(q.max())) == (form.low, form.high)


def test_impossible_formats_are_refused():
    for options in ({"bits": 5}, {"bits": 1}, {"bits": 4, "stored_bits": 5}):
        with pytest.raises(ValueError, match="expected 2 or more bits in a divisor of 8 stored ones"):
            Format(symmetric=True, **options)
    with pytest.raises(ValueError, match="symmetric=True"):
        Format(4)


def test_every_method_makes_a_scheme_and_every_scheme_has_its_linear():
    assert {method for scheme in SCHEMES.values() for method in scheme.methods} == set(METHODS)
    for method in METHODS:
        made = [scheme for scheme in SCHEMES.values() if method in scheme.methods]
        assert scheme_made_by(method) is made[0] and [scheme_made_by(method, row.name) for row in made] == made
        for name in (FLOAT.name, *(row.name for row in SCHEMES.values() if row not in made)):
            with pytest.raises(ValueError, match=f"method '{method}' makes {', '.join(row.name for row in made)}, got"):
                scheme_made_by(method, name)
    for name, scheme in SCHEMES.items():
        assert scheme_named(name) is scheme and scheme.name == name
        assert scheme.weights is not None and issubclass(linear_class(scheme), SchemeLinear)
        assert linear_class(scheme)(8, 4, scheme=scheme).scheme is scheme


def test_the_page_lists_every_scheme():
    page = (PACKAGE.parent / "docs" / "format.md").read_text(encoding="utf-8")
    for scheme in SCHEMES.values():
        formats = [form.words() if form else "float" for form in (scheme.weights, scheme.activations, scheme.kv)]
        cells = [f"`{scheme.name}`", *formats, ", ".join(scheme.methods)]
        assert f"| {' | '.join(cells)} |" in page


def test_unknown_names_and_formats_without_a_kernel_are_refused():
    for name in ("w2a2", FLOAT.name, None, ["w4a16"]):
        with pytest.raises(ValueError, match=f"this quota reads {', '.join(SCHEMES)}, got"):
            scheme_named(name)
    for scheme in SCHEMES.values():
        for other in SCHEMES.values():
            if linear_class(other) is not linear_class(scheme):
                with pytest.raises(ValueError, match=f"scheme {other.name}: expected weights "):
                    linear_class(scheme)(8, 4, scheme=other)


def _literals(path: Path) -> Iterator[ast.Constant]:
    """Constants of a file but docstrings, and but numbers that a module or a class gives a name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef):
            named = [part for part in node.body if isinstance(part, ast.Assign | ast.AnnAssign)]
            skipped |= {id(x) for part in named for x in ast.walk(part) if isinstance(x, ast.Constant) and _number(x)}
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            skipped.add(id(node.body[0].value))  # type: ignore[attr-defined]
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in skipped)


def _number(node: ast.Constant) -> bool:
    return type(node.value) in (int, float)


def test_no_other_room_names_a_scheme():
    names = re.compile(rf"\b({'|'.join(SCHEMES)})\b", re.IGNORECASE)
    rooms = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in _literals(path)
        if isinstance(node.value, str) and names.search(node.value)
    }
    assert rooms <= {"core/formats.py", "bench/gpu/times.py"}  # a contender's name


def test_no_other_room_repeats_a_format_s_numbers():
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.value}"
        for room in COMPUTING
        for path in (PACKAGE / room).rglob("*.py")
        for node in _literals(path)
        if _number(node) and node.value in NUMBERS
    ]
    assert found == []
