"""A vault and a courier that are started apart, as in two containers: how they meet, and again."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from fedtune import __version__
from fedtune.core.config import load_site
from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.flower.ports import free_port
from fedtune.launch import apart
from fedtune.launch.apart import CourierLeft, NotAccepted, VaultSocket
from fedtune.launch.site import Again, Shown
from tests.isolation.test_halves import CONFINES, ROOT, a_site
from tests.network.kit import PRIVATE, SITES, Consortium, children, consortium, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="who is at a socket, Linux says")
KNOCK = """
import array, socket, sys
knocking = socket.socket(socket.AF_UNIX)
try:
    knocking.connect(sys.argv[1])
    told, ends, _, _ = socket.recv_fds(knocking, 4096, 2)
    print(len(ends))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def door(tmp_path: Path) -> Iterator[VaultSocket]:
    with VaultSocket(tmp_path / "vault") as opened:
        yield opened


def knock(door: VaultSocket) -> socket.socket:
    knocking = socket.socket(socket.AF_UNIX)
    knocking.connect(str(door.path))
    return knocking


def test_a_courier_gets_its_two_ends_and_the_second_none(door: VaultSocket) -> None:
    with knock(door) as first, door.wait() as guest, knock(door) as second:
        asks, ours = socket.socketpair()
        tells, heard = socket.socketpair()
        guest.hand_over(asks=asks.fileno(), tells=tells.fileno(), once=True, patience=3.5)
        given = apart._receive(first)
        assert (given.once, given.patience) == (True, 3.5)
        os.write(given.asks, b"request")
        os.write(given.tells, b"event")
        assert (ours.recv(100), heard.recv(100)) == (b"request", b"event")
        door.refuse_courier()
        with pytest.raises(NotAccepted, match="another courier"):
            apart._receive(second)
        assert guest.alive
        first.close()
        assert not guest.alive and isinstance(guest.build_end_error(), CourierLeft)
        for end_ in (asks, ours, tells, heard):
            end_.close()
        for number in (given.asks, given.tells):
            os.close(number)


def test_the_socket_is_of_its_user_alone_and_goes_with_the_vault(tmp_path: Path) -> None:
    path = tmp_path / "vault"
    with VaultSocket(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(ConfigError, match="another vault"), VaultSocket(path):
            pass
    assert not path.exists()


def test_a_socket_that_a_killed_vault_left_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "vault"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with VaultSocket(path) as door, knock(door):
        pass
    path.write_text("a person's file")
    with pytest.raises(ConfigError, match="not a socket"), VaultSocket(path):
        pass
    assert path.read_text() == "a person's file"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not a socket"), VaultSocket(path):
        pass
    with pytest.raises(ConfigError, match="listened on"), VaultSocket(tmp_path / ("long" * 30)):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "twin"])
def test_another_user_is_not_spoken_to(checked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the rights of the socket let it in; the twin, without a look at who it is, hands
    both ends to it."""
    if not checked:
        monkeypatch.setattr(apart, "is_same_user", lambda connection: True)
    folder = Path("/tmp") / f"fedtune-door-{os.getpid()}-{checked}"  # pytest's own is closed
    folder.mkdir()
    try:
        with VaultSocket(folder / "vault") as door:
            folder.chmod(0o777)
            assert knocked_by_nobody(door.path) == "PermissionError"
            door.path.chmod(0o666)

            def serve() -> None:
                with suppress(OSError), door.wait() as guest, socket.socket() as other:
                    guest.hand_over(
                        asks=other.fileno(), tells=other.fileno(), once=False, patience=1
                    )

            serving = threading.Thread(target=serve, daemon=True)
            serving.start()
            assert knocked_by_nobody(door.path) == ("0" if checked else "2")
            if checked:  # it still waits for one of its own user
                with knock(door) as mine:
                    assert len(socket.recv_fds(mine, 4096, 2)[1]) == 2
            serving.join(10)
    finally:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()


def knocked_by_nobody(path: Path) -> str:
    python = "/usr/bin/python3"
    done = subprocess.run(
        [python, "-c", KNOCK, str(path)], user="nobody", capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"refused": "another courier is there"}, "another courier"),
        ({"release": "0.0.1", "once": False, "patience": 1.0}, "release 0.0.1"),
        ({"release": __version__, "once": False, "patience": 1.0}, "another program than a vault"),
        ([], "another program than a vault"),
        (None, "the vault has ended"),
    ],
)
def test_a_courier_says_why_it_waits(told: object, why: str) -> None:
    here, there = socket.socketpair()
    with here, there:
        if told is not None:
            there.sendall(json.dumps(told).encode())
        there.close()
        with pytest.raises(NotAccepted, match=why):
            apart._receive(here)


def test_a_courier_that_leaves_is_waited_for_as_often_as_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vault that does not last is given up, as ever."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    again = Again(Shown(load_site(a_site(tmp_path)), lambda *_: None))
    for _ in range(20):
        assert again.after(CourierLeft("left"))
    with pytest.raises(InfrastructureError):
        for _ in range(20):
            again.after(InfrastructureError("the vault ended by itself"))


@CONFINES
def test_without_landlock_a_courier_counts_as_confined_only_where_no_record_is(
    tmp_path: Path,
) -> None:
    """In a container of its own there is nothing to keep from it; beside the records there is."""
    site = a_site(tmp_path)
    for private in ("state/site.key", "data.jsonl", ""):
        look = (
            "import json, sys; from pathlib import Path; from fedtune.core import isolation\n"
            "isolation.landlock_version = lambda: 0\n"
            "from fedtune.core.config import load_site\n"
            "from fedtune.courier.process import confine\n"
            "print(json.dumps(confine(load_site(Path(sys.argv[1]))).facts()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", look, str(site)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        assert ("records elsewhere" in found["means"]) == (not private)
        assert found["reasons"] == ["no Landlock"]  # said, whether or not anything is open for it
        assert bool(found["missing"]) == bool(private), found
        if private:
            (tmp_path / private).unlink()


# --------------------------------------------------------------------------------- a whole study


def goes_on(made: Consortium, server: subprocess.Popen[bytes], at: int) -> bool:
    """Whether a further round was kept, or the study is over."""
    return made.rounds() > at or server.poll() is not None


@pytest.mark.long
def test_halves_that_are_killed_in_mid_study_are_waited_for(
    tmp_path: Path, tiny_base: Path
) -> None:
    """The vault is killed, then the courier, each started again as a container would be: the study
    goes to its end, and each round that north trained is charged."""
    rounds = 4
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, PRIVATE, rounds)
        server = made.server()
        until(made.listens, 120, made.told)
        for name in SITES:
            made.join(name)
        for name in SITES[:1] + SITES[2:]:
            made.client(name, "--once")
        vault, courier = made.halves("north", "--once")
        until(lambda: made.rounds() >= 1, 300, made.told)
        assert set(children(vault.pid)) == {"vault"}
        assert set(children(courier.pid)) == {"courier", "supernode"}
        for half, again in ((vault, "vault"), (courier, "courier")):
            at = made.rounds()
            half.send_signal(signal.SIGKILL)
            half.wait()
            if again == "vault":
                vault = made.half("north", "vault", "--once")
            else:
                courier = made.half("north", "courier")
            until(partial(goes_on, made, server, at), 400, made.told)
        assert server.wait(600) == 0, made.told()
        assert vault.wait(60) == 0 and courier.wait(60) == 0, made.told()
        assert not (made.root / "north" / "vault.socket").exists()
        report = made.report()
        trained = [entry["participants"] for entry in report["rounds"]]
        assert len(trained) == rounds and all("north" in each for each in trained)
        spent = made.spending("north")
        charged = Counter(each.charge.round for each in spent)
        assert {each.charge.round for each in spent if each.released} == set(range(1, rounds + 1))
        noised = made.noised("north")
        assert all(noised[number] <= charged[number] for number in noised)
