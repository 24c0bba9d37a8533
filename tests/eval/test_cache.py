from __future__ import annotations

from pathlib import Path

import pytest

import quota
from quota.core.errors import UsageError
from quota.eval.cache import StageCache, code_fingerprint, link


def test_a_finished_stage_is_reused_and_other_parts_are_another_stage(tmp_path: Path) -> None:
    runs: list[Path] = []

    def work(path: Path) -> None:
        runs.append(path)
        path.write_text("done")

    cache = StageCache(tmp_path / "cache", "code")
    first = cache.make("profile", {"keep": 0.3}, work)
    assert cache.make("profile", {"keep": 0.3}, work) == first
    assert cache.make("profile", {"keep": 0.2}, work) != first
    assert StageCache(tmp_path / "cache", "other code").make("profile", {"keep": 0.3}, work) != first
    assert len(runs) == 3
    assert [(t["stage"], t["reused"]) for t in cache.timings] == [
        ("profile", False),
        ("profile", True),
        ("profile", False),
    ]


def test_an_interrupted_stage_runs_again_on_what_it_left(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, "code")

    def killed(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.make("quantized", {}, killed)
    seen: list[str] = []
    cache.make("quantized", {}, lambda path: seen.append(path.read_text()))
    assert seen == ["half"] and not cache.timings[-1]["reused"]


def test_a_deleted_result_is_made_again(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, "code")
    path = cache.make("x", {}, lambda p: p.write_text("1"))
    path.unlink()
    cache.make("x", {}, lambda p: p.write_text("2"))
    assert path.read_text() == "2"


def test_link_replaces_links_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "file").write_text(name)
        link(tmp_path / "quantized", tmp_path / "cache" / name)
        assert (tmp_path / "quantized" / "file").read_text() == name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "quantized"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="mine: expected a link of quota's"):
        link(tmp_path / "mine", tmp_path / "cache" / "a")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_code_fingerprint_sees_computing_source_only(tmp_path: Path) -> None:
    deciding = ("allocate", "calib", "core", "eval", "models", "nn", "ops", "prune", "quant", "runtime", "scenes")
    for name in (*deciding, "cli", "demo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.py").write_text("1")
    before = code_fingerprint(tmp_path)
    for name in ("cli", "demo"):
        (tmp_path / name / "x.py").write_text("2")
    assert code_fingerprint(tmp_path) == before
    for name in deciding:
        assert (Path(quota.__file__).parent / name).is_dir()
        (tmp_path / name / "x.py").write_text("2")
        before, changed = code_fingerprint(tmp_path), before
        assert before != changed, name
