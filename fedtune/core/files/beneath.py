"""Open a file below a folder by a name that is not trusted, such as one that a record holds.

The name's text is judged before the system is asked anything. Then each part is looked up in the
folder of the part before it. A link is not followed by the system: its target is read as text, and
goes on from the folder if it stays inside. So no name and no link makes this process look at
anything outside the folder: another account cannot see that a name was looked up there, and no
mount there can keep the process waiting."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from fedtune.core.files.reading import NotRegular, descriptor, refuse_path

LINKS = 40  # most links that are followed for one name, as in Linux
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Outside(OSError):
    """A name, or a link on the way, leads out of the folder."""


class Beneath:
    """The files below one folder. root: the folder; links on the way to it are followed."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        # A link in the folder may hold the folder's path as the system or as a person spells it.
        self._spelt = [list(path.parts[1:]) for path in (self._root, root.absolute())]

    def open(self, name: str) -> tuple[io.BufferedReader, str]:
        """Open a regular file for reading, without waiting. Return it, and its own path below the
        folder, which is the same for all names that lead to this file by links or other spellings.

        name: the file's path, relative to the folder, without ".."

        Errors: Outside if the name is absolute or has a "..", or a link leads out of the folder;
        OSError if there is no such file, or it cannot be opened; NotRegular if it is no regular
        file."""
        if refuse_path(name):
            raise FileNotFoundError(errno.ENOENT, "no file can have this name")
        if name.startswith("/") or ".." in name.split("/"):
            raise Outside
        waiting, inside, links = _parts(name)[::-1], list[str](), 0
        folder = os.open(self._root, _FOLDER)
        try:
            while waiting:
                part = waiting.pop()
                if part == "..":  # of a link's target: one up from a folder that is no link
                    if not inside:
                        raise Outside
                    waiting += inside[-2::-1]
                elif stat.S_ISLNK(mode := _mode(part, folder)):
                    links += 1
                    if links > LINKS:
                        raise OSError(errno.ELOOP, "too many links")
                    waiting += self._follow(os.readlink(part, dir_fd=folder), inside)[::-1]
                elif waiting:
                    inner = os.open(part, _FOLDER, dir_fd=folder)
                    os.close(folder)
                    folder = inner
                    inside.append(part)
                    continue
                elif stat.S_ISREG(mode):
                    number = descriptor(part, os.O_RDONLY | os.O_NOFOLLOW, folder)
                    return open(number, "rb"), "/".join([*inside, part])
                else:
                    break
                top = os.open(self._root, _FOLDER)  # after a link it goes on from here
                os.close(folder)
                folder, inside = top, []
        finally:
            os.close(folder)
        raise NotRegular(errno.EINVAL, "not a regular file")

    def _follow(self, target: str, inside: list[str]) -> list[str]:
        """Return the parts of the path below the folder to which a link leads. target: the link's
        text; inside: the folders from the top to the link, of which none is a link. Errors: Outside
        if the text leads out of the folder."""
        parts = _parts(target)
        up = next((n for n, part in enumerate(parts) if part != ".."), len(parts))
        at = [] if target.startswith("/") else [*self._spelt[0], *inside]
        whole = at[: max(len(at) - up, 0)] + parts[up:]
        for root in self._spelt:
            if whole[: len(root)] == root:
                return whole[len(root) :]
        raise Outside


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _mode(part: str, folder: int) -> int:
    return os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode
