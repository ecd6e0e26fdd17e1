"""Atomic writes: a file is replaced as a whole or unchanged, a new one complete or absent."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedtune.errors import InfrastructureError


def replace(path: Path, content: bytes, *, private: bool = False) -> Path:
    """Write `content` to `path` atomically and durably (fsync); returns `path`.

    A missing folder is made. private: file (0600) and a folder made here for this user alone.
    Errors: InfrastructureError where the write fails; the file is then unchanged."""
    return _placed(path, content, os.replace, private)


def create(path: Path, content: bytes, *, private: bool = False) -> Path:
    """Write `content` to `path` as `replace` does, unless `path` exists: of several processes that
    create one file, the first counts, and its content stays. Returns `path`.

    Errors: InfrastructureError where the write fails; no file is then left."""
    return _placed(path, content, _link, private)


def _placed(path: Path, content: bytes, place: Callable[[Path, Path], None], private: bool) -> Path:
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.{os.getpid()}.new")
    try:
        _folder(path.parent, 0o700 if private else 0o777)
        try:
            _write(draft, content, 0o600 if private else 0o666)
            place(draft, path)
        except OSError:
            with suppress(OSError):
                os.unlink(draft)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise InfrastructureError(
            f"{path}: cannot be written ({error.strerror or type(error).__name__})",
            todo="free the disk or fix the permissions, then run again",
        ) from None
    return path


def _link(draft: Path, path: Path) -> None:
    with suppress(FileExistsError):  # another process was first: its file counts
        os.link(draft, path)
    draft.unlink()


def sync_folder(folder: Path) -> None:
    """Make the folder's directory entries durable (fsync). Errors: OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folder(path: Path, mode: int) -> None:
    """Make `path` and its missing parents, each durably."""
    if not path.is_dir():
        _folder(path.parent, mode)
        path.mkdir(mode, exist_ok=True)
        sync_folder(path.parent)


def _write(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """Yield a path beside `out`, for a file or a folder, that is renamed to it on success and
    removed on an exception. Errors: InfrastructureError."""
    draft = out.with_name(f"{out.name}.{os.getpid()}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise InfrastructureError(
            f"{out}: cannot be written ({error.strerror or type(error).__name__})",
            todo="free the disk or fix the permissions, then run again",
        ) from None
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
