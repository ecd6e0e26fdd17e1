"""Write the status of a coordinator's home (the folder with its keys): the coordinator's links to
sites, and a row for each study.

    home = HomeStatus(folder)
    home("connected", {"name": "north"})            # the home's own events
    home.study("gait", "2026-12-24T18:00:00Z")      # a sink for the events of one study

status.json lists the rows under "studies", by name. When a server starts, it keeps the rows of the
studies that earlier servers began here. If such a study had not ended, its state becomes "gone". If
there are more than MOST rows, the oldest are removed.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.core.errors import InputError
from fedtune.core.progress import OnEvent
from fedtune.observe.log import SCREEN, Record, cleaned, now
from fedtune.observe.status import ENDED, StatusFile, read_status, updated

MOST = 100
COPIED = (
    *("role", "state", "plan_digest", "private", "round", "rounds", "seconds", "quality"),
    *("error", "reason"),
)


class HomeStatus(StatusFile):
    """The status file of a coordinator's home. The functions that `study` returns may be called
    from several threads.

    - folder: the coordinator's home. If it has a status file already, the file's rows are kept,
      except those of studies that were still queued.
    - strict: whether a field that may not be logged raises NotLoggable, in place of being left out;
      None asks the environment (FEDTUNE_STRICT=1)"""

    def __init__(self, folder: Path, *, strict: bool | None = None) -> None:
        super().__init__(folder, role="coordinator", strict=strict)
        self._mutex = threading.RLock()
        self._rows: dict[str, Record] = {}
        with suppress(InputError):
            for name, study in read_status(folder).studies.items():
                if study.state != "queued":
                    state = study.state if study.over else "gone"
                    self._rows[name] = study.status | {"state": state}
        self._status["studies"] = self._rows

    def write(self) -> None:
        with self._mutex:
            super().write()

    def study(self, name: str, deadline: str = "") -> OnEvent:
        """Add a study, which has not begun yet, to the status as the newest row. Return the
        function that must be called with each event of the study. It updates this row.

        name: the study's name; an earlier row of this name is replaced. deadline: the time (UTC) at
        which the study ends if it is not finished, "" if it has none."""
        status: Record = {"role": "coordinator", "state": "queued", "round": 0}
        status |= {"sites": {}, "last": []}
        self._rows.pop(name, None)
        self._put(name, status, deadline)

        def hear(event: str, data: dict[str, Any]) -> None:
            nonlocal status
            record = cleaned(event, data, strict=self._strict)
            if event not in SCREEN:
                status = updated(status, {"time": now(), **record})
                self._put(name, status, deadline)
                self.write()

        return hear

    def _put(self, name: str, status: Record, deadline: str) -> None:
        with self._mutex:
            self._rows[name] = row_of(status) | ({"deadline": deadline} if deadline else {})
            for oldest in list(self._rows)[:-MOST]:
                del self._rows[oldest]
            if self._status["state"] not in ENDED:
                is_running = any(row["state"] == "running" for row in self._rows.values())
                self._status["state"] = "running" if is_running else "waiting"


def row_of(status: Record) -> Record:
    """Return a study's row, made from the study's status. Its fields:

    - the fields that COPIED names, such as state, rounds and quality, unchanged
    - "epsilon": the largest ε that a site has spent so far
    - "planned": the largest ε that a site will have spent by the plan
    - "sites": the sites for which a reason is noted, such as a refusal"""
    row = {key: status[key] for key in COPIED if key in status}
    sites = status["sites"]
    for key in ("epsilon", "planned"):
        spent = [site[key] for site in sites.values() if site.get(key) is not None]
        row |= {key: max(spent)} if spent else {}
    row["sites"] = {
        name: {"status": site.get("status", ""), "reason": site["reason"]}
        for name, site in sites.items()
        if site.get("reason")
    }
    return row
