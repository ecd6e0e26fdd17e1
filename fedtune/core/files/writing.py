"""Write files atomically: an old file is replaced as a whole or unchanged, and a new file is
complete or absent.

The content is first written to a draft: a file in the same folder whose name ends in PID.new, where
PID is the number of the process that writes it. A process that is killed leaves its draft, and the
next process that works in the folder removes it (`remove_drafts`).

Guarantee: only a regular file is ever replaced, never a link, a pipe or a device."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedtune.core.errors import InfrastructureError, InputError
from fedtune.core.files.reading import descriptor

DRAFT = re.compile(r"\.([0-9]+)\.new\Z")


def replace(path: Path, content: bytes, *, private: bool = False) -> Path:
    """Write `content` to `path` atomically and durably (fsync), and return `path`. Missing folders
    are made.

    private: whether only this user may read the file (0600) and the folders that are made. Errors:
    InfrastructureError if the write fails; an old file is then unchanged, unless only the sync of
    the folder failed."""
    return _place_file(path, content, os.replace, private)


def create(path: Path, content: bytes, *, private: bool = False) -> Path:
    """Write `content` to `path` as `replace` does, unless `path` exists, and return `path`. If
    several processes create the same file, the content of the first stays.

    Errors: InfrastructureError if the write fails; no new file is then left, unless only the sync
    of the folder failed."""
    return _place_file(path, content, _link, private)


def check_replaceable(path: Path, *suffixes: str) -> Path:
    """Check that an output file which a person named can be written, and return its path. Either
    there is no such file yet, or it is a regular file with one of `suffixes`, and will be replaced.
    Its folder must exist, or it must be possible to make it. Errors: InputError."""
    its_kind = path.suffix.lower() in suffixes and path.is_file() and not path.is_symlink()
    if os.path.lexists(path) and not its_kind:
        raise InputError(
            f"{path}: exists, and is not a file that this command replaces",
            f"a new file, or one whose name ends in {' or '.join(suffixes)}",
            "choose another",
        )
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise InputError(
            f"{path}: {above.name} is not a folder", "a file in a folder", "choose another"
        )
    return path


def open_own(path: Path, flags: int) -> int:
    """Open one of the program's own files, to append to it or to lock it, and return its
    descriptor. A missing file is made, and only this user can read it (0600). flags: os.O_… for
    opening. Errors: OSError, also if `path` is a link, a pipe or a device."""
    return descriptor(path, flags | os.O_CREAT | os.O_NOFOLLOW)


def _place_file(
    path: Path, content: bytes, place: Callable[[Path, Path], None], private: bool
) -> Path:
    """Write `content` to a new file beside `path` (the draft), then put it in place with `place`,
    and return `path`.

    - path: the file's place; missing folders on the way to it are made
    - content: all of the file's bytes
    - place: the function that gives the draft (first argument) the file's name (second argument)
    - private: whether only this user may read the file (0600) and the folders that are made

    Errors: InfrastructureError if the file cannot be written, or if a link, a pipe or a device has
    its name."""
    _check_regular(path)
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
            todo="free disk space or fix the permissions, then run again",
        ) from None
    return path


def _check_regular(path: Path) -> None:
    """Check that `path` is not a link, a pipe or a device, which a write must not replace. Errors:
    InfrastructureError."""
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):  # no such file, or the write will report the error
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InfrastructureError(
            f"{path}: cannot be written (it is a link, a pipe or a device)",
            "a new file, or a regular one",
            "choose another name, or remove what is there",
        )


def _link(draft: Path, path: Path) -> None:
    with suppress(FileExistsError):  # another process was first: its file counts
        os.link(draft, path)
    draft.unlink()


def append_line(path: Path, line: bytes, *, durably: bool = True) -> None:
    """Append `line` and a newline to `path`. A missing file is made, and only this user can read
    it. An incomplete line that a crash or a full disk left at the end is cut off first.

    line: the bytes of the line, without a newline; durably: whether the line is on disk when this
    returns; otherwise a power cut may lose the last lines. Errors: OSError; the line may then be
    incomplete, and the next call cuts it off."""
    made = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_own(path, os.O_RDWR | os.O_APPEND)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for a line that another process is writing
        whole = os.lseek(descriptor, 0, os.SEEK_END)
        while whole and os.pread(descriptor, 1, whole - 1) != b"\n":
            whole -= 1
        os.ftruncate(descriptor, whole)
        (write_all if durably else _write_whole)(descriptor, line + b"\n")
    finally:
        os.close(descriptor)
    if made and durably:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's directory entries durable (fsync). Errors: OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folder(path: Path, mode: int) -> None:
    """Make `path` and its missing parents, each durably. mode: the permissions of the folders that
    are made."""
    if not path.is_dir():
        _folder(path.parent, mode)
        path.mkdir(mode, exist_ok=True)
        sync_folder(path.parent)


def _write(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        write_all(descriptor, content)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of `content` to an open file, durably (fsync). Errors: OSError."""
    _write_whole(descriptor, content)
    os.fsync(descriptor)


def _write_whole(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


@contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """A context manager that yields a path beside `out`, at which the block makes a file or a
    folder. At the end this draft is renamed to `out`; if the block raises, it is removed. Errors:
    InfrastructureError."""
    _check_regular(out)
    draft = out.with_name(f"{out.name}.{os.getpid()}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise InfrastructureError(
            f"{out}: cannot be written ({error.strerror or type(error).__name__})",
            todo="free disk space or fix the permissions, then run again",
        ) from None
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            with suppress(OSError):  # not there, or on a disk that refuses this too
                draft.unlink()


def is_abandoned(draft: Path) -> bool:
    """Return whether `draft` has the name of a draft, and the process that wrote it has ended. The
    name contains that process's number. If it is this process's own number, the result is True,
    since an earlier process can have had the same number: so call this before this process writes
    any draft."""
    named = DRAFT.search(draft.name)
    try:
        if named and int(named[1]) != os.getpid():  # in a container both may be process 1
            os.kill(int(named[1]), 0)
            return False
        return named is not None
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False


def remove_drafts(folder: Path) -> None:
    """Remove the drafts of killed processes from `folder` and its subfolders.

    Call this before the process writes there (`is_abandoned`). A draft that cannot be removed
    stays, and does no harm."""
    for root, _, files in os.walk(folder):
        for path in (Path(root) / name for name in files):
            if is_abandoned(path):
                with suppress(OSError):
                    path.unlink()
