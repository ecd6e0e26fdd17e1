"""A vault reaches no network, a courier no record: as root, and as a user without rights.

The twin of each way out is the same program without its confinement, which gets out."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from fedtune.core import isolation, system_calls
from fedtune.core.errors import InfrastructureError
from tests.isolation import attempts

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not isolation.landlock_version() or os.uname().machine not in system_calls.MACHINES,
    reason="this Linux has no Landlock, or another machine's system calls",
)
# What needs a right that this process may lack here, so that its twin does not get out either.
PRIVILEGED = {"raw_packets", "packets_of_the_link", "the_network_that_it_left"}
PRIVILEGED |= {"anothers_descriptor", "read_the_vaults_memory", "trace_the_vault"}  # of a parent
PRIVILEGED |= {
    "make_the_disk_a_file_of_its_own",
    "read_the_vaults_memory_by_a_call",
    *(
        "open_the_vaults_files",
        "watch_the_whole_disk",
        "read_what_others_send",
        "have_the_system_keep_accounts",
    ),
}
MAY_LACK = {
    *("the_host_of_a_virtual_machine", "multipath_tcp", "the_machines_other_calls"),
    *("tcp_fast_open", "operations_that_pass_by_a_filter", "tcp6", "a_shell"),
    *("mount_something_over_the_records", "see_how_full_the_disk_is_by_an_old_call"),
    *("read_the_users_keyring", "have_the_system_keep_accounts", "ask_for_what_a_user_may_fill"),
}


def serving(listener: socket.socket) -> None:
    """Answer "!" to whoever asks."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                if listener.type == socket.SOCK_DGRAM:
                    _, sender = listener.recvfrom(1000)
                    if sender:
                        listener.sendto(b"!", sender)
                    continue
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while connection.recv(1):
                connection.sendall(b"!")

    threading.Thread(target=serve, daemon=True).start()


def listening(stack: ExitStack, family: int, kind: int, address: Any) -> Any:
    listener = stack.enter_context(socket.socket(family, kind))
    listener.bind(address)
    if kind == socket.SOCK_STREAM:
        listener.listen()
    serving(listener)
    return listener.getsockname()


@pytest.fixture
def given() -> Iterator[dict[str, Any]]:
    """What lies in wait outside, open to any user: nothing but the confinement stops who tries."""
    with tempfile.TemporaryDirectory() as folder:
        yield from waiting_in(Path(folder))


def waiting_in(folder: Path) -> Iterator[dict[str, Any]]:
    abstract = f"fedtune-{secrets.token_hex(8)}"
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    with ExitStack() as stack:
        tcp = listening(stack, socket.AF_INET, stream, ("127.0.0.1", 0))[1]
        tcp6 = 0
        with suppress(OSError):  # a machine without IPv6
            tcp6 = listening(stack, socket.AF_INET6, stream, ("::1", 0))[1]
        udp = listening(stack, socket.AF_INET, datagram, ("127.0.0.1", 0))[1]
        listening(stack, socket.AF_UNIX, stream, f"\0{abstract}")
        listening(stack, socket.AF_UNIX, stream, str(folder / "s"))
        listening(stack, socket.AF_UNIX, datagram, str(folder / "d"))
        inherited = stack.enter_context(socket.create_connection(("127.0.0.1", tcp)))
        os.set_inheritable(inherited.fileno(), True)
        for name in ("own", "data", "state", "code/__pycache__", "cache"):
            (folder / name).mkdir(parents=True)
        (folder / "data" / "records.jsonl").write_text("secret")
        for name in ("state/site.key", "state/ledger.db", "site.toml", "code/module.py"):
            (folder / name).write_text("x = 1\n")
        secret = ctypes.create_string_buffer(b"secret")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        yield {
            "tcp": tcp,
            "tcp6": tcp6,
            "udp": udp,
            "abstract": abstract,
            "stream": str(folder / "s"),
            "datagram": str(folder / "d"),
            "inherited": inherited.fileno(),
            "parent": os.getpid(),
            "records": str(folder / "data" / "records.jsonl"),
            "key": str(folder / "state" / "site.key"),
            "own": str(folder / "own"),
            "code": str(folder / "code"),
            "cache": str(folder / "cache"),
            "site": str(folder / "site.toml"),
            "vault": os.getpid(),
            "address": ctypes.addressof(secret),
            "secret": secret,
        }


def tried(half: str, given: dict[str, Any], *, confined: bool, user: str = "") -> dict[str, Any]:
    """Run a half's attempts in a process of its own, which inherits what a real half would."""
    told = {k: v for k, v in given.items() if k != "secret"} | {"half": half}
    python = sys.executable
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    if user:  # whose own Python may lie where only root reads, and so may this code
        python = shutil.which("python3", path="/usr/bin:/bin") or pytest.skip("no Python for all")
        reads = [python, "-c", "import tests.isolation.attempts"]
        as_user: Any = {"user": user, "cwd": "/", "env": environment, "check": False}
        if subprocess.run(reads, capture_output=True, **as_user).returncode:
            pytest.skip(f"{user} cannot read {ROOT}")
    inherited = () if confined else (given["inherited"],)  # `Child` hands on what it is told alone
    done = subprocess.run(
        [python, "-m", "tests.isolation.attempts", half if confined else "open", json.dumps(told)],
        cwd="/",
        env=environment,
        pass_fds=inherited,
        capture_output=True,
        text=True,
        user=user or None,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def spaces_can_be_made(user: str) -> bool:
    command = ["unshare", "--net", "true"] if os.getuid() == 0 and not user else []
    command = command or ["unshare", "--user", "--net", "true"]
    return subprocess.run(command, user=user or None, capture_output=True).returncode == 0


USERS = ["", pytest.param("nobody", marks=pytest.mark.skipif(os.getuid() != 0, reason="not root"))]


@pytest.mark.parametrize("user", USERS)
def test_no_way_leads_from_the_vault_to_a_network(given: dict[str, Any], user: str) -> None:
    found = tried("vault", given, confined=True, user=user)
    assert found["out"] == []
    assert "seccomp" in found["means"]
    assert found["missing"] == [] and ("namespace" in found["means"]) == spaces_can_be_made(user)
    assert len(attempts.VAULT) >= 20


@pytest.mark.parametrize("user", USERS)
def test_no_way_leads_from_the_courier_to_a_record_or_a_key(
    given: dict[str, Any], user: str
) -> None:
    found = tried("courier", given, confined=True, user=user)
    assert found["out"] == []
    assert "seccomp" in found["means"] and any("landlock" in each for each in found["means"])
    assert len(attempts.COURIER) >= 36


@pytest.mark.parametrize("half", ["vault", "courier"])
def test_each_way_is_open_without_the_confinement(given: dict[str, Any], half: str) -> None:
    """The twin."""
    ways = attempts.VAULT if half == "vault" else attempts.COURIER
    lacking = MAY_LACK | (PRIVILEGED if os.getuid() else set())
    out = set(tried(half, given, confined=False)["out"])
    assert set(ways) - out <= lacking, set(ways) - out


ON_THE_NETWORK = """
import errno, json, socket, sys
from fedtune.core import isolation
found = isolation.no_network([socket.AF_INET, socket.AF_INET6, socket.AF_UNIX]).facts()
socket.socket(socket.AF_INET).close()
try:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
except OSError as error:
    found["refused"] = errno.errorcode[error.errno]
with open("/proc/self/status") as status:
    found["filters"] = [line.split()[1] for line in status if line.startswith("Seccomp:")]
print(json.dumps(found))
"""


@pytest.mark.skipif(not system_calls.is_known(), reason="another machine's system calls")
def test_a_vault_that_a_database_keeps_on_the_network_has_the_filter_all_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_NETWORK], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = json.loads(done.stdout)
    assert found["means"] == ["seccomp"] and found["filters"] == ["2"]
    assert found["missing"] == ["a database over TCP keeps it on the network"]
    assert found["refused"] == "EPERM"


def test_a_process_with_threads_is_not_confined_in_part() -> None:
    with pytest.raises(InfrastructureError, match="threads"):
        waiting = threading.Event()
        thread = threading.Thread(target=waiting.wait)
        thread.start()
        try:
            isolation.no_network()
        finally:
            waiting.set()
            thread.join()
