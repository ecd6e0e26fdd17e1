"""Define the interface of a page: the files that refresh it, the values for its template, and its
curves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from fedtune.observe.status import LOCK, held


class Page(ABC):
    """A page about what lies at one path on disk: a run, a site and so on. Its template is
    templates/KIND.html.

    - kind: the page's kind, which names its templates
    - parts: the names of the page's parts. The browser fetches the parts again whenever one of the
      page's `files` changes. The template of a part is templates/KIND_PART.html
    - slow: the names of the functions of work.py whose results the page shows, each computed in a
      child process"""

    kind: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("top", "bottom", "rounds")
    slow: ClassVar[tuple[str, ...]] = ()  # functions of work.py whose results the page fetches

    def __init__(self, path: Path, trust: str = "") -> None:
        self.path, self.trust = path, trust

    @property
    @abstractmethod
    def title(self) -> str:
        """The page's heading: the name of what the page shows, such as a study or a site."""

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """List the files whose changes refresh the page. Some of them may not exist."""

    @abstractmethod
    def read_context(self) -> dict[str, Any]:
        """Return the values that the template shows, by name. This must take milliseconds only.
        Errors: FedtuneError."""

    def series(self) -> dict[str, Any] | None:
        """Return the values from which the page's script draws its curves, by name. They can be
        written as JSON. Return None if the page has no curves."""
        return None

    def read_rounds(self) -> None:  # noqa: B027 - a page without rounds has none to read
        """Read the rounds that were added to the run's files since the last call, and keep them in
        this object. For a large study the first call takes seconds."""

    def child(self, name: str) -> Page | None:
        """Return the page of the run `name` inside this page; None if there is no such run."""
        return None

    def slow_files(self) -> Iterable[Path]:
        """List the files on which the results of the functions in `slow` depend."""
        return ()

    @staticmethod
    def signature(files: Iterable[Path]) -> str:
        """Return a text that is another one as soon as one of the files changes. If a status.lock
        is among the files, the text also changes when a process locks this file or releases it."""
        marks = []
        for path in files:
            try:
                about = path.stat()
            except OSError:
                continue
            marks.append(f"{path.name}:{about.st_mtime_ns}:{about.st_size}:{about.st_ino}")
            if path.name == LOCK:
                marks.append(str(held(path)))
        return "|".join(marks)


class Notice(dict[str, str]):
    """One alarm. level: "bad" or "warn"; text: says what is wrong and what to do."""

    def __init__(self, level: str, text: str) -> None:
        super().__init__(level=level, text=text)
