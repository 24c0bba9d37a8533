import hashlib
from pathlib import Path

import pytest

from quota.core.errors import UsageError
from quota.core.files import (
    OUTPUT_MARK,
    atomic_folder,
    atomic_write_bytes,
    atomic_write_text,
    claim_folder,
    reserve,
    sha256_file,
)


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    atomic_write_text(path, "old")
    atomic_write_text(path, "né\n")
    assert path.read_bytes() == "né\n".encode() and [p.name for p in path.parent.iterdir()] == ["a.txt"]
    assert sha256_file(path) == hashlib.sha256("né\n".encode()).hexdigest()


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic_write_bytes(path, b"old")
    with pytest.raises(TypeError):
        atomic_write_bytes(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for content in ("one", "two"):
        with atomic_folder(path, lambda file: str(file) == "one") as work:
            (work / content).write_text(content)
            assert not path.exists() or not (path / content).exists()
        assert [p.name for p in path.iterdir()] == [content]
    assert list(tmp_path.iterdir()) == [path]


def test_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_folder(path) as work:
        (work / "one").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(path, lambda _: True) as work:
        (work / "two").write_text("2")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["one"] and list(tmp_path.iterdir()) == [path]


def test_what_others_wrote_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.txt"), atomic_folder(path, lambda file: str(file) == "one"):
        pass
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        claim_folder(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_a_claimed_folder_stays_claimed(tmp_path: Path) -> None:
    path = claim_folder(tmp_path / "new")
    (path / "report.json").write_text("{}")
    assert claim_folder(path) == path and sorted(p.name for p in path.iterdir()) == [OUTPUT_MARK, "report.json"]


def test_space_is_reserved_or_refused_with_both_figures(tmp_path: Path) -> None:
    """The limit on a file's size stands for a full disk: the call fails as it does there."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "a").open("wb") as file:
        reserve(file, tmp_path / "a", 4096)
        assert (tmp_path / "a").stat().st_size == 4096
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, old[1]))
        try:
            with pytest.raises(UsageError, match=r"needs 1000000 bytes on the disk, \d+ are free"):
                reserve(file, tmp_path / "a", 1_000_000)
            with pytest.raises(UsageError, match="b: File too large"):
                atomic_write_bytes(tmp_path / "b", b"x" * 10_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
