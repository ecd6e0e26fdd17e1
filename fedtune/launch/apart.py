"""Run a site's two halves separately, as in two containers: `fedtune vault` and `fedtune courier`.

    fedtune vault ── listens at PATH ──────────── its own child: the vault
        │  passes two descriptors: one for requests, one for events
        ▼
    fedtune courier ── connects to PATH ───────── its own child: the courier

Once both are connected, vault and courier communicate over the same kind of sockets as the children
of one `fedtune client`. Each connection has its own sockets, so a restarted process never reads
bytes that were meant for its predecessor.

| if                                          | then                                           |
| the peer belongs to another user            | neither side communicates with it              |
| a courier connects while another is here    | it is refused, and tries again                 |
| one side ends, killed or not                | the other ends its child, waits, and reconnects |

Guarantee: the vault takes no byte and no descriptor from this connection. A courier can only send
it requests and events of bounded length and fixed types (core/wire/requests.py, events.py)."""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.core.config import load_site
from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.core.processes import Child, alone
from fedtune.core.progress import OnEvent
from fedtune.courier.process import FOLDER
from fedtune.flower.link import link as read_link
from fedtune.launch.until_stopped import until_stopped

OWN = 0o177  # umask for a new socket: only this user can read and write it
MOST = 4096  # largest number of bytes of the vault's first message to a courier
DONE = b"done"  # the vault's last message to a courier that need not connect again
LAST_WORD = 5.0  # seconds for which a courier waits for this message
PAUSE = 1.0  # seconds between two attempts of a courier
PEER = struct.Struct("3i")  # process, user, group: Linux's struct ucred


class CourierLeft(InfrastructureError):
    """Raised in a vault if its courier, which `fedtune courier` runs, has ended the connection."""


class VaultSocket:
    """The vault's socket, to which a courier connects. As a context manager it makes the socket at
    `path`, and removes it at the end.

    Errors: ConfigError if the process cannot listen at `path`, or another vault listens there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> VaultSocket:
        self.listener = socket.socket(socket.AF_UNIX)
        try:
            self._remove_stale()
            before = os.umask(OWN)
            try:
                self.listener.bind(str(self.path))
            finally:
                os.umask(before)
            self.listener.listen(4)
        except OSError as error:
            self.listener.close()
            raise ConfigError(
                f"--socket {self.path}: cannot be listened on ({error.strerror or error})",
                "a path of at most 100 characters, in a folder that this user may write",
            ) from None
        except BaseException:
            self.listener.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        with suppress(OSError):
            self.path.unlink()

    def wait(self) -> ConnectedCourier:
        """Wait until a courier of this user connects, and return its connection."""
        while True:
            connection, _ = self.listener.accept()
            if is_same_user(connection):
                return ConnectedCourier(connection)
            connection.close()

    def refuse_courier(self) -> None:
        """Refuse a courier that tries to connect while another one is connected."""
        connection, _ = self.listener.accept()
        with connection, suppress(OSError):
            if is_same_user(connection):
                connection.sendall(json.dumps({"refused": "another courier is there"}).encode())

    def _remove_stale(self) -> None:
        """Remove a socket that a killed vault has left. Errors: ConfigError if another vault
        listens, or `path` is not a socket."""
        try:
            is_socket = stat.S_ISSOCK(self.path.lstat().st_mode)
        except FileNotFoundError:
            return
        if not is_socket:
            raise ConfigError(f"--socket {self.path}: exists, and is not a socket", "a free name")
        with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionError):
            probe.connect(str(self.path))
            raise ConfigError(
                f"--socket {self.path}: another vault listens there", "one vault at a time"
            )
        self.path.unlink()


class ConnectedCourier:
    """A courier that has connected. As a context manager it closes the connection at the end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def hand_over(self, *, asks: int, tells: int, once: bool, patience: float) -> ConnectedCourier:
        """Pass the courier what it needs to work: two file descriptors and two settings.

        - asks: descriptor of the socket on which it sends requests and receives their answers
        - tells: descriptor of the socket on which it sends events
        - once: whether the courier ends when a coordinator that gave this site work has gone
        - patience: for how many seconds the courier tries again if the coordinator refuses this
          site

        Return this object. If the courier has left meanwhile, nothing is passed; `alive` is then
        False."""
        words = {"release": __version__, "once": once, "patience": patience}
        with suppress(OSError):  # the courier has left; `alive` is False then
            socket.send_fds(self._connection, [json.dumps(words).encode()], [asks, tells])
        return self

    def dismiss(self) -> None:
        """Tell the courier that it need not connect again."""
        with suppress(OSError):
            self._connection.sendall(DONE)

    @property
    def alive(self) -> bool:
        return not has_ended(self._connection)

    def build_end_error(self) -> InfrastructureError:
        """Build the error that says that the courier has left; it is not raised here."""
        return CourierLeft("the courier of this site has left")

    def __enter__(self) -> ConnectedCourier:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def is_same_user(connection: socket.socket) -> bool:
    """Return whether the process at the other end of a Unix socket belongs to this user, as
    Linux reports it."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
    _, user, _ = PEER.unpack(told)
    return bool(user == os.getuid())


def has_ended(connection: socket.socket) -> bool:
    """Return whether the other end of a connection is closed. Takes no byte from the connection."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


# --------------------------------------------------------------------------------- the courier


@dataclass(frozen=True)
class Received:
    """What a courier receives from its vault when it connects: two file descriptors and two
    settings.

    - asks: descriptor of the socket on which it sends requests and receives their answers
    - tells: descriptor of the socket on which it sends events
    - once: whether the courier ends when a coordinator that gave this site work has gone
    - patience: for how many seconds the courier tries again if the coordinator refuses this site"""

    asks: int
    tells: int
    once: bool
    patience: float


def carry(site_path: Path, socket_path: Path, *, on_event: OnEvent) -> None:
    """Run the courier of a site whose vault listens at `socket_path`, until a signal arrives or the
    vault says that the work is done. Reconnect to the vault as often as needed.

    The courier reads site.toml, the coordinator's answer and the site's network keys, and writes to
    its own folder. It needs no record, ledger or signing key on its machine.

    - site_path: the site file
    - socket_path: the path of the vault's socket
    - on_event: called with the name of each event ("waiting", "connected", "reconnecting",
      "stopped") and a dict about it

    Errors: ConfigError or Refused if the answer or a key is not usable; KeyboardInterrupt at
    Ctrl-C."""
    site = load_site(site_path, alone=True)
    link, home = read_link(site, site_path), site.site.state / FOLDER
    with until_stopped(on_event), alone(home / "courier", "fedtune courier"):
        while True:
            on_event("waiting", {"text": f"waiting for the vault at {socket_path}"})
            with _connect(socket_path, on_event) as (vault, given):
                options = [str(site_path.resolve()), str(given.asks), str(given.tells)]
                options += ["once" if given.once else "", str(given.patience)]
                keep = [given.asks, given.tells]
                log_file = home / "courier.log"
                with Child("courier", options, home=home, log=log_file, keep=keep) as courier:
                    for end in keep:
                        os.close(end)
                    text = f"the vault is there; the coordinator is at {link.address}"
                    on_event("connected", {"text": text})
                    while courier.alive and not _is_readable(vault, 0.5):
                        pass
                    # A courier whose work is done ends first; then the vault sends DONE.
                    if _is_dismissed(vault, LAST_WORD if courier.status == 0 else 0.0):
                        return
            text = "the courier or the vault has ended; both start again"
            on_event("reconnecting", {"seconds": PAUSE, "text": text})
            time.sleep(PAUSE)


@contextmanager
def _connect(socket_path: Path, on_event: OnEvent) -> Iterator[tuple[socket.socket, Received]]:
    """A context manager: connect to the vault, and try again until the vault accepts this courier.
    Yield two things: the connection, which is closed at the end of the block, and what the vault
    passed (Received).

    - socket_path: the path of the vault's socket
    - on_event: called with "waiting" and a dict about it when the reason for waiting changes"""
    said = ""
    while True:
        with socket.socket(socket.AF_UNIX) as vault:
            try:
                vault.connect(str(socket_path))
                given = _receive(vault)
            except OSError as error:
                why = f"{error.strerror or error}"
            except NotAccepted as error:
                why = str(error)
            else:
                yield vault, given
                return
        if why != said:
            said = why
            on_event("waiting", {"text": f"waiting for the vault at {socket_path}: {why}"})
        time.sleep(PAUSE)


class NotAccepted(Exception):
    """Raised in a courier if the vault, or another program in its place, does not accept it. The
    text says why."""


def _is_readable(vault: socket.socket, seconds: float) -> bool:
    """Wait up to `seconds` for a message of the vault, or for the end of its connection. Return
    whether one of these came."""
    return bool(select.select([vault], [], [], seconds)[0])


def _is_dismissed(vault: socket.socket, seconds: float) -> bool:
    """Wait up to `seconds` for the vault's last message. Return True if it came and says that the
    work is done, so that the courier need not connect again; else False."""
    with suppress(OSError):
        return _is_readable(vault, seconds) and vault.recv(len(DONE)) == DONE
    return False


def _receive(vault: socket.socket) -> Received:
    """Receive the file descriptors and settings that the vault passes to a courier that has
    connected. Errors: OSError; NotAccepted if the vault does not accept this courier, or is not a
    vault of this user and release."""
    if not is_same_user(vault):
        raise NotAccepted("another user listens there")
    told, ends, _, _ = socket.recv_fds(vault, MOST, 2)
    try:
        words: dict[str, Any] = json.loads(told or b'{"refused": "the vault has ended"}')
        if "refused" in words:
            raise NotAccepted(str(words["refused"]))
        if words["release"] != __version__:
            raise NotAccepted(f"the vault has release {words['release']}, not {__version__}")
        asks, tells = ends
        return Received(asks, tells, words["once"] is True, float(words["patience"]))
    except BaseException as error:
        for end in ends:
            os.close(end)
        if isinstance(error, ValueError | KeyError | TypeError):
            raise NotAccepted("another program than a vault listens there") from None
        raise
