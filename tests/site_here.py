"""A site's two halves in the process of a test: no confinement, the same messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedtune.core.config import load_site
from fedtune.core.progress import OnEvent
from fedtune.core.vault.answers import Place
from fedtune.core.vault.process import answer_and_tell
from fedtune.core.wire.requests import Answer, Request
from fedtune.courier.app import client_app
from fedtune.courier.executor import Executor
from fedtune.flower import api
from fedtune.launch.site import Shown


class SiteHere:
    """Answers messages as `fedtune client` does, and shows `notify` what it shows."""

    def __init__(
        self, path: Path, notify: OnEvent, coordinator: str = "", reviewed: str = ""
    ) -> None:
        self.place = Place(str(path), coordinator, watch=False, reviewed=reviewed)
        self.shown = Shown(load_site(path), notify)
        self._executor = Executor(client_app(self._ask), self._tell)

    def _tell(self, event: str, facts: dict[str, Any]) -> None:
        self.shown.from_courier(event, facts)

    def _ask(self, _: Context, request: Request, seconds: float) -> Answer:
        return answer_and_tell(self.place, request, self.shown.from_vault)  # type: ignore[arg-type]

    def reply(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        own = Context(context.run_id, context.node_id, {}, RecordDict(), {})
        return self._executor.reply(api.CLIENT_APP, message, own)
