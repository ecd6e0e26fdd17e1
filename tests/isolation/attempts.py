"""Ways out of a confined process, each a function that returns normally if it got out.

    python attempts.py vault|courier|open GIVEN

runs those of one half, confined or (open) not, and prints the names of those that got out as JSON.
GIVEN: JSON with what lies in wait outside: ports, sockets, files, the parent's process id."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.core import isolation, system_calls

X86 = os.uname().machine == "x86_64"
Attempt = Callable[[dict[str, Any]], None]
VAULT: dict[str, Attempt] = {}
COURIER: dict[str, Attempt] = {}


def of(table: dict[str, Attempt]) -> Callable[[Attempt], Attempt]:
    def enter(function: Attempt) -> Attempt:
        table[function.__name__] = function
        return function

    return enter


def reached(sent: bytes = b"?") -> None:
    if sent != b"!":
        raise AssertionError("no answer")


def ask(connection: socket.socket) -> None:
    with connection:
        connection.settimeout(5)
        connection.sendall(b"?")
        reached(connection.recv(1))


def syscall(number: int, *arguments: Any) -> int:
    whole = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]  # 64 bits each
    result = int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *whole))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


# ------------------------------------------------------------------- from the vault to a network


@of(VAULT)
def tcp(given: dict[str, Any]) -> None:
    ask(socket.create_connection(("127.0.0.1", given["tcp"]), 5))


@of(VAULT)
def tcp6(given: dict[str, Any]) -> None:
    ask(socket.create_connection(("::1", given["tcp6"]), 5))


@of(VAULT)
def udp(given: dict[str, Any]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        sending.settimeout(5)
        sending.sendto(b"?", ("127.0.0.1", given["udp"]))
        reached(sending.recv(1))


@of(VAULT)
def a_name_server(given: dict[str, Any]) -> None:
    """A question as a resolver would send it; whoever hears it has been told."""
    question = struct.pack("!6H", 1, 256, 1, 0, 0, 0) + b"\x06secret\x04test\x00\x00\x01\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        sending.settimeout(5)
        sending.sendto(question, ("127.0.0.1", given["udp"]))
        reached(sending.recv(1))


@of(VAULT)
def tcp_fast_open(given: dict[str, Any]) -> None:
    with socket.socket() as sending:
        sending.settimeout(5)
        sending.sendto(b"?", 0x20000000, ("127.0.0.1", given["tcp"]))
        reached(sending.recv(1))


@of(VAULT)
def a_port_of_its_own(given: dict[str, Any]) -> None:
    """It listens, and somebody outside comes."""
    with socket.create_server(("127.0.0.1", 0)) as mine:
        mine.settimeout(5)
        with socket.create_connection(mine.getsockname(), 5):
            mine.accept()[0].close()


@of(VAULT)
def multipath_tcp(given: dict[str, Any]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as sending:
        sending.settimeout(5)
        sending.connect(("127.0.0.1", given["tcp"]))
        sending.sendall(b"?")
        reached(sending.recv(1))


@of(VAULT)
def raw_packets(given: dict[str, Any]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sending:
        sending.sendto(b"\x08\x00\xf7\xff" + bytes(4), ("127.0.0.1", 0))


@of(VAULT)
def packets_of_the_link(given: dict[str, Any]) -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


@of(VAULT)
def netlink(given: dict[str, Any]) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()


@of(VAULT)
def the_host_of_a_virtual_machine(given: dict[str, Any]) -> None:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()


@of(VAULT)
def an_abstract_socket(given: dict[str, Any]) -> None:
    with socket.socket(socket.AF_UNIX) as sending:
        sending.connect("\0" + given["abstract"])
        ask(sending)


@of(VAULT)
def a_daemons_socket(given: dict[str, Any]) -> None:
    with socket.socket(socket.AF_UNIX) as sending:
        sending.connect(given["stream"])
        ask(sending)


@of(VAULT)
def a_datagram_to_a_daemons_socket(given: dict[str, Any]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
        sending.sendto(b"?", given["datagram"])


@of(VAULT)
def a_pair_of_datagram_sockets(given: dict[str, Any]) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.sendto(b"?", given["datagram"])


@of(VAULT)
def a_child(given: dict[str, Any]) -> None:
    code = f"import socket; s = socket.create_connection(('127.0.0.1', {given['tcp']}), 5); "
    subprocess.run([sys.executable, "-c", code + "s.sendall(b'?')"], check=True)


@of(VAULT)
def a_shell(given: dict[str, Any]) -> None:
    command = f"exec 3<>/dev/tcp/127.0.0.1/{given['tcp']}"
    subprocess.run(["bash", "-c", command], check=True, stderr=subprocess.DEVNULL)


@of(VAULT)
def the_call_itself(given: dict[str, Any]) -> None:
    number = system_calls.SOCKET[not X86]
    os.close(syscall(number, socket.AF_INET, socket.SOCK_STREAM, 0))


@of(VAULT)
def the_machines_other_calls(given: dict[str, Any]) -> None:
    """x86-64's second table of calls; a Linux that lacks it answers "no such call"."""
    try:
        os.close(syscall(0x40000000 | 41, socket.AF_INET, socket.SOCK_STREAM, 0))
    except OSError as error:
        if error.errno == 38:  # not refused: it is not there
            return
        raise


@of(VAULT)
def operations_that_pass_by_a_filter(given: dict[str, Any]) -> None:
    os.close(syscall(425, 1, ctypes.create_string_buffer(120)))  # io_uring_setup


@of(VAULT)
def an_inherited_descriptor(given: dict[str, Any]) -> None:
    """A connected socket that the process which started this one has open."""
    ask(socket.socket(fileno=given["inherited"]))


@of(VAULT)
def anothers_descriptor(given: dict[str, Any]) -> None:
    process = os.pidfd_open(given["parent"])
    os.close(syscall(438, process, given["inherited"], 0))  # pidfd_getfd


@of(VAULT)
def the_network_that_it_left(given: dict[str, Any]) -> None:
    there = os.open(f"/proc/{given['parent']}/ns/net", os.O_RDONLY)
    syscall(system_calls.NEVER["setns"][os.uname().machine != "x86_64"], there, 0)
    socket.create_connection(("127.0.0.1", given["tcp"]), 5).close()


# -------------------------------------------------------- from the courier to a record or a key


@of(COURIER)
def open_the_records(given: dict[str, Any]) -> None:
    Path(given["records"]).read_bytes()


@of(COURIER)
def open_the_signing_key(given: dict[str, Any]) -> None:
    Path(given["key"]).read_bytes()


@of(COURIER)
def list_the_folder_of_the_records(given: dict[str, Any]) -> None:
    os.listdir(Path(given["records"]).parent)


@of(COURIER)
def open_them_by_a_link(given: dict[str, Any]) -> None:
    link = Path(given["own"], "link")
    link.symlink_to(given["records"])
    try:
        link.read_bytes()
    finally:
        link.unlink()


@of(COURIER)
def make_a_hard_link(given: dict[str, Any]) -> None:
    link = Path(given["own"], "hard")
    os.link(given["records"], link)
    link.unlink()


@of(COURIER)
def move_them_to_its_folder(given: dict[str, Any]) -> None:
    moved = Path(given["own"], "moved")
    os.rename(given["records"], moved)
    os.rename(moved, given["records"])


@of(COURIER)
def make_the_disk_a_file_of_its_own(given: dict[str, Any]) -> None:
    """Root may make a device's file anywhere; this one is the null device's, and harmless."""
    device = Path(given["own"], "disk")
    os.mknod(device, 0o600 | 0o020000, os.makedev(1, 3))
    device.unlink()


@of(COURIER)
def read_the_vaults_memory(given: dict[str, Any]) -> None:
    with open(f"/proc/{given['vault']}/mem", "rb") as memory:
        memory.seek(given["address"])
        assert memory.read(6) == b"secret"


@of(COURIER)
def read_the_vaults_memory_by_a_call(given: dict[str, Any]) -> None:
    into = ctypes.create_string_buffer(6)
    here = ctypes.create_string_buffer(struct.pack("PN", ctypes.addressof(into), 6))
    there = ctypes.create_string_buffer(struct.pack("PN", given["address"], 6))
    number = system_calls.NEVER["process_vm_readv"][os.uname().machine != "x86_64"]
    syscall(number, given["vault"], here, 1, there, 1, 0)
    assert into.raw == b"secret"


@of(COURIER)
def open_the_vaults_files(given: dict[str, Any]) -> None:
    os.readlink(f"/proc/{given['vault']}/fd/0")
    os.close(os.open(f"/proc/{given['vault']}/environ", os.O_RDONLY))


@of(COURIER)
def trace_the_vault(given: dict[str, Any]) -> None:
    number = system_calls.NEVER["ptrace"][os.uname().machine != "x86_64"]
    syscall(number, 0x4206, given["vault"], 0, 0)  # PTRACE_SEIZE; it ends with this process


@of(COURIER)
def stop_the_vault(given: dict[str, Any]) -> None:
    os.kill(given["vault"], 0)


@of(COURIER)
def have_a_daemon_read_them(given: dict[str, Any]) -> None:
    """As a user's bus or a container's daemon would: `systemd-run --user cat records`."""
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.connect(given["stream"])
        ask(daemon)


@of(COURIER)
def have_an_abstract_daemon_read_them(given: dict[str, Any]) -> None:
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.connect("\0" + given["abstract"])
        ask(daemon)


@of(COURIER)
def have_a_child_read_them(given: dict[str, Any]) -> None:
    code = f"open({given['records']!r}).read()"
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


@of(COURIER)
def see_how_full_the_disk_is(given: dict[str, Any]) -> None:
    """It follows from how much the ledger has to remember, and so from how many records."""
    os.statvfs("/usr")


@of(COURIER)
def see_how_full_the_memory_is(given: dict[str, Any]) -> None:
    syscall(99 if X86 else 179, ctypes.create_string_buffer(256))  # sysinfo


@of(COURIER)
def see_how_full_the_disk_is_by_an_old_call(given: dict[str, Any]) -> None:
    disk = os.stat(given["own"]).st_dev
    if not X86:
        raise OSError("64-bit ARM has no ustat")
    syscall(136, os.major(disk) << 8 | os.minor(disk), ctypes.create_string_buffer(64))


@of(COURIER)
def ask_for_what_a_user_may_fill(given: dict[str, Any]) -> None:
    folder = os.open(given["own"], os.O_RDONLY)
    try:  # Q_GETFMT of users: the kind of the quotas, if there are any
        syscall(443, folder, 0x800004 << 8, 0, ctypes.create_string_buffer(64))
    except OSError as error:
        if error.errno != errno.ESRCH:  # there are none, and the call was made
            raise
    finally:
        os.close(folder)


@of(COURIER)
def list_what_the_disk_holds_where(given: dict[str, Any]) -> None:
    """FS_IOC_GETFSMAP, of all files and of what is free: refused by the filter, or not known to
    this file system, or done."""
    asked = struct.pack("=4xI16x" + "I20xQQQ8x" * 2, 0, 0, 0, 0, 0, 2**32 - 1, *[2**64 - 1] * 3)
    folder = os.open(given["own"], os.O_RDONLY)
    try:
        fcntl.ioctl(folder, 0xC0C0583B, bytearray(asked.ljust(192, b"\0")))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            raise
    finally:
        os.close(folder)


@of(COURIER)
def read_what_others_send(given: dict[str, Any]) -> None:
    """Every packet of this machine, such as a database's on 127.0.0.1."""
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP).close()


@of(COURIER)
def watch_the_records(given: dict[str, Any]) -> None:
    """The name of each file that the other half opens, when it does."""
    watch = syscall(294 if X86 else 26, 0)  # inotify_init1
    try:
        path = str(Path(given["records"]).parent).encode()
        syscall(254 if X86 else 27, watch, path, 0xFFF)
    finally:
        os.close(watch)


@of(COURIER)
def take_a_file_out_of_memory(given: dict[str, Any]) -> None:
    """So that how long a later reading takes tells whether the other half has read it since."""
    with Path(given["own"], "read").open("w+b") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@of(COURIER)
def see_which_pages_are_in_memory(given: dict[str, Any]) -> None:
    """preadv2 with RWF_NOWAIT: EAGAIN for a page that is not, of any file that this half reads."""
    with Path(sys.executable).open("rb") as file:
        byte = ctypes.create_string_buffer(1)
        into = ctypes.create_string_buffer(struct.pack("PN", ctypes.addressof(byte), 1))
        try:
            syscall(327 if X86 else 286, file.fileno(), into, 1, 0, 0, os.RWF_NOWAIT)
        except OSError as error:  # the call was made, and said it of a page or of this file system
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise


@of(COURIER)
def watch_the_whole_disk(given: dict[str, Any]) -> None:
    os.close(syscall(300 if X86 else 262, 0x200, 0))  # fanotify_init, by a file's name


@of(COURIER)
def time_the_vault(given: dict[str, Any]) -> None:
    """The clock of another process: its processor's time so far."""
    clock = (~given["vault"] << 3) | 2
    time.clock_gettime(clock)


@of(COURIER)
def have_the_system_keep_accounts(given: dict[str, Any]) -> None:
    """Of each process that ends, one conversion of a unit: its time and memory, in a file."""
    path = Path(given["own"], "accounts")
    path.touch()
    syscall(163 if X86 else 89, str(path).encode())  # acct
    syscall(163 if X86 else 89, 0)


@of(COURIER)
def read_the_users_keyring(given: dict[str, Any]) -> None:
    syscall(250 if X86 else 219, 0, -4, 0)  # keyctl: KEYCTL_GET_KEYRING_ID of the user's


@of(COURIER)
def open_the_records_to_every_account(given: dict[str, Any]) -> None:
    path = Path(given["records"])
    path.chmod(path.stat().st_mode)


@of(COURIER)
def give_the_key_to_another_account(given: dict[str, Any]) -> None:
    os.chown(given["key"], os.getuid(), os.getgid())


@of(COURIER)
def date_the_records_back(given: dict[str, Any]) -> None:
    os.utime(given["records"])


@of(COURIER)
def limit_the_vaults_memory(given: dict[str, Any]) -> None:
    resource.prlimit(given["vault"], resource.RLIMIT_CORE, (0, 0))


@of(COURIER)
def count_the_users_processes(given: dict[str, Any]) -> None:
    """By a limit of its own, up to which it starts some: of that limit all of the user's count."""
    limit = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, limit)


@of(COURIER)
def count_them_by_the_call_itself(given: dict[str, Any]) -> None:
    """From a place in memory whose address is null in its lower half, which is all that a filter
    compares at once; and by the older call."""
    limit = struct.pack("QQ", *(n % 2**64 for n in resource.getrlimit(resource.RLIMIT_NPROC)))
    place, fixed = 2**36, 0x100000 | 0x20 | 2  # MAP_FIXED_NOREPLACE, MAP_ANONYMOUS, MAP_PRIVATE
    memory = ctypes.CDLL(None, use_errno=True).mmap
    memory.restype, memory.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_long] * 5]
    if memory(place, 4096, 3, fixed, -1, 0) != place:
        raise AssertionError("no such place")
    ctypes.memmove(place, limit, len(limit))
    try:
        syscall(302 if X86 else 261, 0, resource.RLIMIT_NPROC, place, 0)  # prlimit64
    except OSError:
        syscall(160 if X86 else 164, resource.RLIMIT_NPROC, place)  # setrlimit


@of(COURIER)
def ask_for_the_users_priority(given: dict[str, Any]) -> None:
    """The highest of all processes of the user."""
    os.getpriority(os.PRIO_USER, 0)


@of(COURIER)
def count_the_pages_that_had_to_be_read(given: dict[str, Any]) -> None:
    """Of a library's file that is mapped: those that no other process has read."""
    resource.getrusage(resource.RUSAGE_SELF)


@of(COURIER)
def count_the_pages_that_a_child_had_to_read(given: dict[str, Any]) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        os.wait4(child, 0)
    except OSError:
        os.waitpid(child, 0)
        raise


@of(COURIER)
def take_a_users_share_of_pipes(given: dict[str, Any]) -> None:
    """A user's pipes have so much memory together: what is refused tells how much others take."""
    here, there = os.pipe()
    try:
        fcntl.fcntl(here, fcntl.F_SETPIPE_SZ, 2 * 65_536)
    finally:
        os.close(here)
        os.close(there)


@of(COURIER)
def choose_the_vaults_processors(given: dict[str, Any]) -> None:
    os.sched_setaffinity(given["vault"], os.sched_getaffinity(given["vault"]))


# ------------------------------------------------- from the courier into what the vault would run


def write(path: Path) -> None:
    """Write a file and take it away again, if one may."""
    path.write_text("planted = True\n")
    path.unlink()


@of(COURIER)
def plant_a_module(given: dict[str, Any]) -> None:
    write(Path(given["code"], "planted.py"))


@of(COURIER)
def change_a_module(given: dict[str, Any]) -> None:
    os.close(os.open(Path(given["code"], "module.py"), os.O_WRONLY | os.O_APPEND))


@of(COURIER)
def plant_compiled_code(given: dict[str, Any]) -> None:
    write(Path(given["code"], "__pycache__", "module.cpython-311.pyc"))


@of(COURIER)
def truncate_a_module(given: dict[str, Any]) -> None:
    os.truncate(Path(given["code"], "module.py"), 0)


@of(COURIER)
def plant_a_path_file(given: dict[str, Any]) -> None:
    write(Path(given["code"], "planted.pth"))


@of(COURIER)
def change_the_site_file(given: dict[str, Any]) -> None:
    os.close(os.open(given["site"], os.O_WRONLY | os.O_APPEND))


@of(COURIER)
def replace_the_site_file(given: dict[str, Any]) -> None:
    other = Path(given["own"], "site.toml")
    other.write_text(Path(given["site"]).read_text())
    os.replace(other, given["site"])


@of(COURIER)
def plant_a_base(given: dict[str, Any]) -> None:
    write(Path(given["cache"], "config.json"))


@of(COURIER)
def change_the_ledger(given: dict[str, Any]) -> None:
    os.close(os.open(Path(given["key"]).with_name("ledger.db"), os.O_RDWR))


@of(COURIER)
def remove_the_ledger(given: dict[str, Any]) -> None:
    ledger = Path(given["key"]).with_name("ledger.db")
    ledger.unlink()
    ledger.touch()


@of(COURIER)
def mount_something_over_the_records(given: dict[str, Any]) -> None:
    subprocess.run(
        ["unshare", "--user", "--mount", "--map-root-user", "true"],
        check=True,
        stderr=subprocess.DEVNULL,
    )


def main() -> None:
    half, told = sys.argv[1:]
    given = json.loads(told)
    means = isolation.Confinement()
    if half == "vault":
        means = isolation.no_network()
    elif half == "courier":
        read = [Path(p) for p in (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc")]
        read += [Path(isolation.__file__).parent, Path(given["site"]), Path(given["code"])]
        means = isolation.only_files(read, [Path(given["own"]), Path("/dev/null")])
    out = []
    for name, attempt in (VAULT if given["half"] == "vault" else COURIER).items():
        try:
            attempt(given)
        except Exception:  # whatever stopped it: it did not get out
            continue
        out.append(name)
    print(json.dumps({"out": out, **means.facts()}))


if __name__ == "__main__":
    main()
