import hashlib
from pathlib import Path

import pytest

from quota.core.files import atomic_folder, atomic_write_bytes, atomic_write_text, sha256_file


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
        with atomic_folder(path) as work:
            (work / content).write_text(content)
            assert not path.exists() or not (path / content).exists()
        assert [p.name for p in path.iterdir()] == [content]
    assert list(tmp_path.iterdir()) == [path]


def test_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_folder(path) as work:
        (work / "one").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(path) as work:
        (work / "two").write_text("2")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["one"] and list(tmp_path.iterdir()) == [path]
