"""Every verb teaches, answers bad input with one line, and reads and checks recipes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quota.core.formats import SCHEMES
from tests.cli import calls
from tests.cli.calls import quota

_RECIPE_VERBS = ("build", "explain", "validate", "diff", "upgrade")
VERBS = (
    ["doctor"],
    ["calibrate"],
    ["recipe"],
    *(["recipe", verb] for verb in _RECIPE_VERBS),
    ["run"],
    ["eval"],
    ["study"],
    ["demo"],
)
RECIPE: dict[str, Any] = {
    "schema_version": 2,
    "method": "quota",
    "regime": "w4a4kv4",
    "model": {
        "architecture": "LlavaForConditionalGeneration",
        "fingerprint": "sha256:00",
        "layers": 8,
        "visual_tokens": 576,
    },
    "candidates": [2, 3, 4],
    "keep": [0.8, 0.5, 0.3],
    "final_keep": 0.3,
    "tau": 1.0,
    "reference": "recorded",
    "reference_tokens": 576,
    "sensitivities": [0.3, 0.2, 0.1],
}


def fails(result: Any, *words: str) -> None:
    """Here no model is loaded, so nothing else is on stderr."""
    calls.fails(result, *words)
    assert len([line for line in result.stderr.splitlines() if line.strip()]) == 1, result.stderr


def recipe_file(folder: Path, name: str = "recipe.json", **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({**RECIPE, **changes}))
    return path


# -- help
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_teaches_by_example(verb: list[str]) -> None:
    result = quota(*verb, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output and f"quota {verb[0]}" in result.output


def test_every_verb_is_listed_and_version_prints() -> None:
    import quota as package

    listed = quota("--help").output
    assert all(verb[0] in listed for verb in VERBS)
    assert quota("--version").output.strip() == package.__version__


def test_help_is_quick_to_import() -> None:
    """The command's module loads no model library."""
    code = "import sys, quota.cli.main; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_options_are_usage_errors() -> None:
    assert quota("run", "--no-such-option").exit_code == 2
    assert quota("no-such-verb").exit_code == 2


# -- bad input, found before any model is loaded
# -------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["0", "1.5", "-0.1", "nan"])
def test_keep_out_of_range(tmp_path: Path, keep: str) -> None:
    fails(
        quota("recipe", "ckpt", "--model", "m", "--samples", "s.json", "--keep", keep, "--out", tmp_path / "r.json"),
        "keep",
        keep,
    )
    fails(quota("demo", "--keep", keep, "--out", tmp_path / "demo"), "keep", keep)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", ["6-2", "x", "2-", ""])
def test_layers_spelling(tmp_path: Path, layers: str) -> None:
    fails(
        quota(
            "recipe", "ckpt", "--model", "m", "--samples", "s.json", "--layers", layers, "--out", tmp_path / "r.json"
        ),
        "layers",
    )


def test_choices_are_listed(tmp_path: Path) -> None:
    base = ["recipe", "ckpt", "--model", "m", "--samples", "s.json", "--out", tmp_path / "r.json"]
    fails(quota(*base, "--tau", "0"), "--tau", "0")
    fails(quota(*base, "--method", "best"), "--method", "quota, uniform", "best")
    fails(quota(*base, "--compute", "0.4", "--keep", "0.3"), "--compute", "without --keep")
    fails(quota(*base, "--method", "vtw", "--compute", "0.4"), "--compute", "not with vtw")
    fails(quota(*base, "--method", "fastv", "--plot", tmp_path / "p.png"), "--plot", "fastv")
    fails(quota("recipe", "ckpt", "--samples", "s.json", "--out", tmp_path / "r.json"), "--model", "quota")
    fails(quota(*base, "--position-policy", "none"), "--position-policy", "original, compact")
    made = ["calibrate", "m", "--samples", "s.json", "--out", tmp_path / "q"]
    fails(quota(*made, "--method", "best"), "--method", "flatquant, gptq, awq, rtn", "best")
    fails(quota(*made, "--method", "awq", "--steps", "3"), "--steps", "flatquant")
    fails(
        quota(*made, "--method", "flatquant", "--scheme", "w4a16"),
        "--scheme",
        "flatquant",
        "makes w4a4kv4, got 'w4a16'",
    )
    fails(quota(*made, "--modules", "vision,head"), "--modules", "vision, projector, llm", "head")
    fails(quota(*made, "--modules", ","), "--modules")


def test_no_such_checkpoint(tmp_path: Path) -> None:
    fails(quota("run", tmp_path / "nowhere", "-p", "hello"), "nowhere")
    fails(quota("eval", tmp_path / "nowhere"), "nowhere")
    (tmp_path / "empty").mkdir()
    fails(quota("run", tmp_path / "empty", "-p", "hello"), "config.json")
    (tmp_path / "file").write_text("")
    fails(quota("calibrate", tmp_path / "file", "--samples", "s.json", "--out", tmp_path / "q"), "MODEL", "is a file")


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    fails(
        quota("calibrate", folder, "--samples", "s.json", "--out", tmp_path / "file" / "q"),
        "--out",
        "not a writable folder",
    )
    fails(quota("demo", "--out", tmp_path / "file" / "demo"), "not a writable folder")


def test_bad_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    fails(quota("run", folder, "-p", "hello", "-i", tmp_path / "no.jpg"), "no.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    fails(quota("run", folder, "-p", "hello", "-i", tmp_path / "bad.jpg"), "bad.jpg", "not a readable image")
    fails(quota("run", folder, "-p", " "), "--prompt")
    fails(quota("run", folder, "-p", "x", "--show", tmp_path / "o.png"), "--show", "--recipe")


# -- recipes
# -------------------------------------------------------------------------------------------------------------


def test_explain(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    text = quota("recipe", "explain", path)
    assert text.exit_code == 0 and "173" in text.stdout
    document = json.loads(quota("recipe", "explain", path, "--json").stdout)
    assert document["final_tokens"] == 173 and len(document["layers"]) == 8


def test_validate_names_every_bad_file(tmp_path: Path) -> None:
    good = recipe_file(tmp_path)
    rising = recipe_file(tmp_path, "rising.json", keep=[0.3, 0.5, 0.3])
    unknown = recipe_file(tmp_path, "unknown.json", surprise=1)
    assert quota("recipe", "validate", good).exit_code == 0
    result = quota("recipe", "validate", good, rising, unknown)
    assert result.exit_code == 1 and "ok" in result.stdout
    assert "keep" in result.stderr and "surprise" in result.stderr
    rows = json.loads(quota("recipe", "validate", good, rising, "--json").stdout)
    assert [r["valid"] for r in rows] == [True, False]


def test_a_broken_recipe_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"schema_version": 2,')
    fails(quota("recipe", "explain", tmp_path / "r.json"), "r.json", "JSON")
    fails(quota("recipe", "explain", tmp_path / "none.json"), "none.json")
    fails(quota("recipe", "explain", recipe_file(tmp_path, keep=[0.8, 0.5, 0.0], final_keep=0.0)), "keep")


def test_diff(tmp_path: Path) -> None:
    a, b = recipe_file(tmp_path, "a.json"), recipe_file(tmp_path, "b.json", tau=0.5)
    assert "same" in quota("recipe", "diff", a, a).stdout
    assert "tau" in quota("recipe", "diff", a, b).stdout
    assert quota("recipe", "diff", a, b).exit_code == 0
    assert quota("recipe", "diff", a, b, "--exit-code").exit_code == 1
    assert json.loads(quota("recipe", "diff", a, b, "--json").stdout) == [{"field": "tau", "first": 1.0, "second": 0.5}]


def test_upgrade_rewrites_all_or_none(tmp_path: Path) -> None:
    before = dict(candidates=[-1, 3, 4], selections=[{"score": "random"}], schema_version=1)
    a, b = (recipe_file(tmp_path, name, **before) for name in ("a.json", "b.json"))
    new, bad = recipe_file(tmp_path, "new.json"), recipe_file(tmp_path, "bad.json", schema_version=1, keep=[1, 2, 3])
    untouched = {path: path.read_bytes() for path in (a, b, new, bad)}
    fails(quota("recipe", "explain", a), "a.json", "schema_version", "quota recipe upgrade")
    fails(quota("recipe", "upgrade", a, b, bad), "bad.json", "keep")
    fails(quota("recipe", "upgrade", a, b, "--out", tmp_path / "c.json"), "--out", "one FILE")
    fails(quota("recipe", "upgrade", a, "--out", b), "--out", "exists")
    assert all(path.read_bytes() == data for path, data in untouched.items())

    copied = quota("recipe", "upgrade", a, "--out", tmp_path / "c.json")
    assert copied.exit_code == 0 and a.read_bytes() == untouched[a]
    result = quota("recipe", "upgrade", a, b, new, *Path("recipes").glob("*.json"))
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "schema_version: 1 -> 2; candidates[0]: -1 -> 0; digest: sha256:" in said and "this version already" in said
    assert new.read_bytes() == untouched[new]
    assert a.read_bytes() == b.read_bytes() == (tmp_path / "c.json").read_bytes()
    assert json.loads(a.read_text())["candidates"] == [0, 3, 4]
    assert json.loads(quota("recipe", "upgrade", a, "--json").stdout) == [{"file": str(a), "changes": []}]


def test_upgrade_writes_through_a_link(tmp_path: Path) -> None:
    real = recipe_file(tmp_path, "real.json", schema_version=1)
    link = tmp_path / "link.json"
    link.symlink_to(real)
    assert quota("recipe", "upgrade", link).exit_code == 0
    assert link.is_symlink() and json.loads(real.read_text())["schema_version"] == 2


# -- doctor
# --------------------------------------------------------------------------------------------------------------


def test_doctor_lists_ops() -> None:
    result = quota("doctor", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0 and document["problems"] == []
    names = {row["op"] for row in document["ops"]}
    assert {
        "quantize_act",
        "w4a4_linear",
        "kv4_append",
        "kv4_attention",
        "token_score",
        "token_select",
        "token_gather",
    } <= names
    assert sum(row["state"] == "chosen" for row in document["ops"]) == len(names)
    assert [row["name"] for row in document["schemes"]] == list(SCHEMES)
    text = quota("doctor")
    assert text.exit_code == 0 and all(scheme.words() in text.stdout for scheme in SCHEMES.values())


def test_doctor_reports_a_wrong_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUOTA_IMPL", "w4a4_linear=magic")
    result = quota("doctor")
    assert result.exit_code == 1 and "magic" in result.stdout and "Traceback" not in result.output


def test_validate_takes_what_a_clone_holds(tmp_path: Path) -> None:
    """The help's own example: `recipes/` of a fresh clone holds the schema."""
    files = sorted(Path("recipes").glob("*.json"))
    result = quota("recipe", "validate", *files, recipe_file(tmp_path))
    assert files and result.exit_code == 0, result.output
    other = tmp_path / "schema.json"
    other.write_text(files[0].read_text().replace('"title": "QUOTA recipe"', '"title": "QUOTA recipe", "old": 1'))
    result = quota("recipe", "validate", other)
    assert result.exit_code == 1 and "another version" in result.stderr


def test_explain_says_both_shares(tmp_path: Path) -> None:
    """What reaches the end, and the mean over layers, side by side."""
    text = " ".join(quota("recipe", "explain", recipe_file(tmp_path)).stdout.split())
    assert "173 (0.3) reach the end; 324.1 (0.5627) on average over 8 layers" in text, text


def test_the_demo_says_how_many_rows_it_makes() -> None:
    report = json.loads(Path("docs/demo/llava/report.json").read_text())
    number = {6: "six", 7: "seven", 8: "eight"}[len(report["evaluation"]["rows"])]
    assert f"evaluates {number} configurations" in quota("demo", "--help").stdout


@pytest.mark.parametrize(
    "page", [*Path().glob("*.md"), *Path("docs").glob("*.md"), *Path("quota").rglob("*.py")], ids=str
)
def test_no_command_installs_from_an_index_that_has_no_quota(page: Path) -> None:
    assert not re.search(r"pip install [^`\n]*['\" ]quota(\[|['\" ]|$)", page.read_text(encoding="utf-8")), page
