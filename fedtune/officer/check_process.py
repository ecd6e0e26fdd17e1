"""Run the process that checks a site before it takes part; `fedtune client` starts it and waits.

The process reads the records as the vault does: without a network. Its memory is freed when it
ends, and the process that started it never imports the code that reads records."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from fedtune.core.config import load_site
from fedtune.core.config.checked import keep_checked
from fedtune.core.errors import FedtuneError
from fedtune.core.processes import end_with_parent
from fedtune.core.progress import listening
from fedtune.core.vault.process import confine
from fedtune.core.wire.events import Teller, pass_warnings_on


def main(options: list[str]) -> None:
    """Check a site, and send the findings to the process that started this one. If nothing is
    wrong, store the tables that were checked, for the vaults that are started next.

    options: the path of site.toml, and the file descriptor to which the findings are written."""
    path, events = options
    site = load_site(Path(path))
    confine(site, processes=1)  # the vault, which starts next, says what this machine lacks
    end_with_parent()
    tell = Teller(Connection(int(events)))
    pass_warnings_on(tell)
    from fedtune.officer.before_joining import check_before_joining

    try:
        with listening(tell.step):
            check_before_joining(site)
        keep_checked(site)
    except FedtuneError as error:
        tell.error(error)
