"""Commands that run a site: vault and courier together, or each by itself, as in two containers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli import network
from fedtune.cli.exit_codes import command
from fedtune.cli.study import METRICS
from fedtune.core.errors import InputError

SITE = Annotated[
    Path, typer.Argument(metavar="SITE", help="This site's site.toml.", show_default=False)
]
ONCE = Annotated[
    bool,
    typer.Option(
        "--once",
        help="Exit once a coordinator that gave this site work has gone. Default: wait until "
        "it is back.",
    ),
]
PROCESSES = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Share the work of each training step among N processes on this machine.",
    ),
]
WATCH = Annotated[
    bool,
    typer.Option(
        "--watch",
        help="Take part only in studies with a [schedule], which have no last round; without "
        "this option they are refused. The site reads its records again before each "
        "round, and leaves out patients whose budget is used up.",
    ),
]
SOCKET = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        metavar="PATH",
        help="The Unix socket through which the vault and the courier talk; the vault creates it.",
        show_default=False,
    ),
]
SPOOL = Annotated[
    Path | None,
    typer.Option(
        "--spool",
        metavar="DIR",
        help="Exchange files in this folder, in place of a socket: the courier writes "
        "requests there, and the vault writes answers. No other user may be able to "
        "write there.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the commands on `app`. panel: the heading under which --help lists them."""
    for function in (client, vault, courier):
        command(app, panel=panel)(function)


def client(
    site: SITE,
    once: ONCE = False,
    processes: PROCESSES = 1,
    watch: WATCH = False,
    metrics_port: METRICS = None,
    answer: network.ANSWER = None,
    fingerprint: network.HEARD = None,
) -> None:
    """Take part as a site: train on this site's records, on this machine, under this site's policy.

    Give --answer the first time: the file that `fedtune admit` wrote. A copy of it is kept beside
    this site's keys. The client runs until stopped (Ctrl-C), also after a study has finished, and
    reconnects by itself. Of the records, only clipped and noised sums leave this machine.

    Under torchrun, rank 0 is the client and the other ranks share its steps."""
    if os.environ.get("RANK", "0") != "0":
        from fedtune.core.vault.rank_process import follow_torchrun

        return follow_torchrun(site.resolve())
    _take_part(site, once, processes, watch, metrics_port, answer, fingerprint)


def vault(
    site: SITE,
    socket: SOCKET = None,
    spool: SPOOL = None,
    request: Annotated[
        str | None,
        typer.Option(
            "--request",
            metavar="NAME",
            help="Answer only this request of the spool, and exit. The command that vault.run in "
            "site.toml names is started with this option.",
            show_default=False,
        ),
    ] = None,
    checked: Annotated[
        Path | None,
        typer.Option(
            "--checked",
            metavar="FILE",
            help="With --request: the settings that were checked when `fedtune vault` was started, "
            "in its state folder. It gives the command of vault.run this option.",
            show_default=False,
        ),
    ] = None,
    once: ONCE = False,
    processes: PROCESSES = 1,
    watch: WATCH = False,
    metrics_port: METRICS = None,
    answer: network.ANSWER = None,
    fingerprint: network.HEARD = None,
) -> None:
    """Take part as a site whose courier runs elsewhere, such as in another container.

    The vault is the part of `fedtune client` that holds records, ledger and keys, and it needs no
    network. It checks the site. With --socket it then serves a `fedtune courier` of the same user,
    and waits for the next when one leaves; with --spool it answers the requests in that folder. In
    all else it works as `fedtune client`."""
    _check_where(socket, spool)
    if request and not spool:
        raise InputError(
            "--request is given without --spool", "--spool DIR, the folder that holds the request"
        )
    if (request is None) != (checked is None):
        raise InputError(
            "only one of --request and --checked is given",
            "both, as `fedtune vault` gives them to the command of vault.run",
            "start `fedtune vault SITE --spool DIR`, which checks the site first",
        )
    if once and spool:
        raise InputError(
            "--once cannot be combined with --spool",
            "--once at the courier, which is connected to the coordinator",
        )
    given = socket, spool, request, checked
    _take_part(site, once, processes, watch, metrics_port, answer, fingerprint, *given)


def courier(site: SITE, socket: SOCKET = None, spool: SPOOL = None, once: ONCE = False) -> None:
    """Carry messages between a `fedtune vault` and the coordinator, over Flower and TLS, without
    access to records.

    The courier reads site.toml, the coordinator's answer and this site's network keys, and writes
    the folder `flower` in the state folder. It waits whenever there is no vault. With --socket it
    runs until stopped, or until a vault with --once has finished. With --spool it writes requests
    to that folder and reads answers from it, and stores a renewed certificate beside the keys;
    --once is then given to the courier, not to the vault."""
    _check_where(socket, spool)
    if once and socket:
        raise InputError(
            "--once cannot be combined with --socket",
            "--once at the vault, which passes it on to the courier",
        )
    from rich.console import Console

    from fedtune.cli.watch import Watch
    from fedtune.core.config import load_site
    from fedtune.courier.process import FOLDER
    from fedtune.observe import observer

    loaded = load_site(site, alone=True)
    screen = Watch(Console(), f"site {loaded.site.name}: its courier")
    with screen, observer("site", loaded.site.state / FOLDER, then=screen) as events:
        if spool:
            from fedtune.launch.spooled import carry as carry_files

            carry_files(site, spool, once=once, on_event=events)
        elif socket:
            from fedtune.launch.apart import carry

            carry(site, socket, on_event=events)


def _check_where(socket: Path | None, spool: Path | None) -> None:
    """Check that exactly one of --socket and --spool is given. Errors: InputError."""
    if (socket is None) == (spool is None):
        raise InputError(
            "--socket and --spool are both given, or neither",
            "exactly one of --socket PATH and --spool DIR",
        )


def _take_part(
    site: Path,
    once: bool,
    processes: int,
    watch: bool,
    metrics_port: int | None,
    answer: Path | None,
    fingerprint: str | None,
    socket: Path | None = None,
    spool: Path | None = None,
    request: str | None = None,
    checked: Path | None = None,
) -> None:
    from rich.console import Console

    from fedtune.cli.watch import Watch
    from fedtune.core.config import load_site
    from fedtune.core.config.checked import load_checked
    from fedtune.observe import observer

    path = site.resolve()
    loaded = load_checked(checked, path) if checked else load_site(site)
    network.join(loaded, answer, fingerprint)
    screen = Watch(Console(), f"site {loaded.site.name}: checking its records")
    seen = observer(
        "site",
        loaded.site.state,
        then=screen,
        site=site,
        metrics_port=metrics_port,
        ledger=loaded.home,
    )
    with screen, seen as events:
        if spool:
            from fedtune.launch import spooled

            how: dict[str, Any] = {"watch": watch, "processes": processes, "on_event": events}
            if request and checked:
                spooled.answer_request(path, spool, request, checked, **how)
            else:
                spooled.answer_requests(path, spool, **how)
        else:
            from fedtune.launch.site import join

            join(
                path,
                once=once,
                watch=watch,
                processes=processes,
                on_event=events,
                socket_path=socket,
            )
    typer.echo(f"left; `fedtune ledger {site}` shows what was spent")
