"""Writes files and folders so that they are either whole or absent, whenever the power goes.

Everything is written under a temporary name in the same folder, flushed to the disk, and then
renamed. This file knows nothing of what is written; an `OSError` names the place that was meant.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

TEMPORARY = ".tmp-"
"""How temporary names begin. What a killed process leaves under such a name may be deleted."""
_LEFTOVER_SECONDS = 24 * 3600


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; the file written there becomes `path` at the end.

    On an error the temporary file is removed and `path` stays as it was.

    Raises:
        OSError: the disk refuses; `filename` is `path`.
    """
    _make_folder(path.parent)
    temporary = _temporary(path.parent)
    try:
        yield temporary
        _sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # not the error of another file, being read
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Yields a binary file that becomes `path` at the end; compressed where it ends in `.gz`.

    On an error `path` stays as it was; see `replacing`.
    """
    with replacing(path) as temporary, temporary.open("xb") as file:
        if path.suffix != ".gz":
            yield file
            return
        # Without name and time: equal rows give equal bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
            yield cast("IO[bytes]", packed)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or none; see `replacing`."""
    with writing(path) as file:
        file.write(data)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yields an empty folder in `parent`, for `publish_folder`; it is removed if it is still there.

    Also removes from `parent` what processes that were killed left a day ago or earlier.
    """
    temporary = _temporary(parent)
    _make_folder(parent)
    _sweep(parent)
    try:
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, folder: Path) -> bool:
    """Renames a folder of files, flushed to the disk; False if `folder` exists and is not empty.

    Of several processes that publish under one name at once, one gets True.

    Raises:
        OSError: the disk refuses.
    """
    for path in temporary.iterdir():
        _sync_file(path)
    sync_folder(temporary)
    try:
        temporary.rename(folder)
    except OSError:
        if folder.is_dir():
            return False
        raise
    sync_folder(folder.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the folder's list of names."""
    if os.name == "nt":  # Windows cannot open a folder, and needs no such call
        return
    _sync(folder, os.O_RDONLY)


def _sync_file(path: Path) -> None:
    _sync(path, os.O_RDWR)  # Windows flushes only what may be written


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(path)) from error


def _temporary(parent: Path) -> Path:
    return parent / f"{TEMPORARY}{uuid.uuid4().hex}"


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):  # another process may sweep too
            if time.time() - path.lstat().st_mtime > _LEFTOVER_SECONDS:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
