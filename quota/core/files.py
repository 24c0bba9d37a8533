"""Writing so that nothing half-written ever stands in place of something good, and no file of another program is
removed."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from quota.core.errors import UsageError

OUTPUT_MARK = ".quota-output"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError of the block names `path`: those of write, fsync and of temporary files beside it do not. A full disk
    is said with the space that is left."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UsageError(
                f"{path}: {error.strerror}, {_free(Path(path))} bytes are free; make room or choose another folder"
            ) from error
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write beside `path`, then rename over it; the mode is the umask's. OSError naming `path` where that fails,
    UsageError on a full disk."""
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
        handle = os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            work.replace(path)
        except BaseException:
            work.unlink(missing_ok=True)
            raise


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` in UTF-8."""
    atomic_write_bytes(path, text.encode())


@contextmanager
def atomic_folder(path: str | Path, owns: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Yields a temporary sibling folder that becomes `path` when the block ends well, and vanishes when it does not.

    A folder that is already there is replaced when it is empty or holds only files that `owns`, given the path below
    the folder, accepts; UsageError otherwise, before and after the block. A link is followed: the folder it names is
    replaced. UsageError for the working folder and those that hold it.
    """
    path = Path(path).resolve()
    if path == Path.cwd() or path in Path.cwd().parents:
        raise UsageError(f"{path}: expected a new folder, got the working folder or one that holds it")
    with naming(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    check_removable(path, owns)
    work, old = _sibling(path), None
    try:
        yield work
        check_removable(path, owns)
        old = _sibling(path)
        if path.exists():
            path.replace(old)
        work.replace(path)
        remove_files(old, owns)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        if old is not None:
            with suppress(OSError):  # what was at `path` is there again
                old.rmdir() if path.exists() else old.replace(path)
        raise


def _sibling(path: Path) -> Path:
    """A fresh empty folder beside `path`, with the umask's mode (mkdtemp would make it private)."""
    with naming(path):
        work = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
        work.mkdir()
    return work


def check_removable(path: Path, owns: Callable[[Path], bool]) -> None:
    """UsageError, naming the first file that is not ours, unless `path` is missing, an empty folder or one with files
    that `owns` accepts only."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise UsageError(f"{path}: expected a folder or a new path, found a file")
    for found in sorted(path.rglob("*")):
        if found.is_symlink() or not (found.is_dir() or owns(found.relative_to(path))):
            raise UsageError(
                f"{path}: holds {found.relative_to(path)}, which quota did not write; move it away or choose another"
                " folder"
            )


def remove_files(path: Path, owns: Callable[[Path], bool]) -> None:
    """Remove the files below `path` that `owns` accepts, then the folders that are empty: what others put there
    stays."""
    for found in sorted(path.rglob("*"), reverse=True):
        if found.is_symlink():
            continue
        if found.is_dir():
            if not any(found.iterdir()):
                found.rmdir()
        elif owns(found.relative_to(path)):
            found.unlink(missing_ok=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def claim_folder(path: str | Path) -> Path:
    """Make `path` a folder of quota's outputs, in which quota replaces its own files: a new one, an empty one, or one
    that is marked already.

    UsageError for any other: a name in it could be that of a file of the user's.
    """
    path = Path(path)
    mark = path / OUTPUT_MARK
    if mark.is_file():
        return path
    check_removable(path, lambda _: False)
    atomic_write_text(mark, "quota writes its outputs here and replaces them; other files stay\n")
    return path


def reserve(file: IO[bytes], path: Path, size: int) -> None:
    """Give `file` its `size` bytes on the disk now, so that a later write cannot find it full. UsageError with both
    figures where they are not there."""
    try:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in _FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        os.ftruncate(file.fileno(), 0)
        raise UsageError(
            f"{path}: needs {size} bytes on the disk, {_free(path)} are free; make room or choose another folder"
        ) from error


def check_space(path: Path, size: int) -> None:
    """UsageError with both figures unless `size` bytes are free where `path` is to be."""
    free = free_bytes(path)
    if size > free:
        raise UsageError(
            f"{path}: needs about {size} bytes on the disk, {free} are free; make room or choose another folder"
        )


def free_bytes(path: Path) -> int:
    """Bytes a user may still write on the disk where `path` is, or is to be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _free(path: Path) -> int | str:
    try:
        return free_bytes(path)
    except OSError:
        return "an unknown number of"


def write_at(file: IO[bytes], path: Path, data: memoryview, offset: int) -> None:
    """Write all of `data` (bytes) at `offset`."""
    with naming(path):
        done = 0
        while done < len(data):
            done += os.pwrite(file.fileno(), data[done:], offset + done)


def read_at(file: IO[bytes], path: Path, out: memoryview, offset: int) -> None:
    """Fill `out` (bytes) from `offset`; OSError where the file ends before."""
    with naming(path):
        done = 0
        while done < len(out):
            got = os.preadv(file.fileno(), [out[done:]], offset + done)
            if not got:
                raise OSError(errno.EIO, "the file is shorter than it was written")
            done += got


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in 1 MiB pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
