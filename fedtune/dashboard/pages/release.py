"""Build the page of a dossier: whether the dossier verifies, who signed it, and its content."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedtune.core.errors import FedtuneError
from fedtune.core.files import reading
from fedtune.dashboard.pages import Notice, Page
from fedtune.evidence.dossier.page import sections

CONTENT = "dossier.json"


class ReleasePage(Page):
    """The dashboard's page of a dossier."""

    kind = "release"
    parts = ("top",)
    slow = ("verified",)

    @property
    def title(self) -> str:
        return self.path.resolve().name

    def files(self) -> Iterable[Path]:
        return [self.path / name for name in ("release.json", CONTENT, "approvals")]

    def slow_files(self) -> Iterable[Path]:
        return self.files()

    def read_context(self) -> dict[str, Any]:
        path = shlex.quote(str(self.path))
        content = dict[str, Any]()
        body = ""
        notices: list[Notice] = []
        try:
            content = reading.json_in(
                self.path / CONTENT, "the dossier's content", most=reading.LARGE
            )
            body = sections(content, pictures=False)
        except (FedtuneError, KeyError, TypeError, AttributeError, ValueError):
            notices.append(Notice("bad", f"{CONTENT} cannot be read: this is no dossier as signed"))
        trust = shlex.quote(self.trust or "FINGERPRINT")
        return {
            "content": content,
            "contents": [(s["id"], s["title"]) for s in content["sections"]] if body else [],
            "body": body,
            "notices": notices,
            "status": {},
            "commands": [
                {"does": "The same in a terminal", "line": f"fedtune verify {path} --trust {trust}"}
            ],
        }
