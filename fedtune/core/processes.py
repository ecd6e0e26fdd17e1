"""Start, watch and stop child processes. No child outlives the process that started it.

A child reads its standard input. When that ends, its parent has ended, even by SIGKILL, and the
child stops itself. Each child has a session of its own, so a terminal's Ctrl-C reaches only the
parent, which then stops its children in order.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from fedtune.core import boot
from fedtune.core.errors import InfrastructureError, Stopped
from fedtune.core.files import locks
from fedtune.core.files.room import reserve

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
Program = Literal[
    "superlink", "supernode", "gateway", "rank", "sites", "checks", "vault", "courier"
]
PROGRAMS: dict[Program, tuple[str, str]] = {  # the module whose main() it is; what people call it
    "superlink": ("fedtune.flower.program", "flower-superlink"),
    "supernode": ("fedtune.flower.program", "flower-supernode"),
    "gateway": ("fedtune.flower.gateway", "the gateway"),
    "rank": ("fedtune.core.vault.rank_process", "a process that shares this site's steps"),
    "sites": ("fedtune.launch.process_pool", "a process of the simulation"),
    "checks": ("fedtune.officer.check_process", "the check of this site and its records"),
    "vault": ("fedtune.core.vault.process", "the half of this site that holds its records"),
    "courier": ("fedtune.courier.process", "the half of this site that speaks to the network"),
}
# These programs confine themselves before they start a thread; only then do they call
# `end_with_parent`, which starts one.
CONFINED = ("checks", "vault", "courier")
AT_A_SITE = ("rank", *CONFINED)  # programs whose logs lie beside a ledger
# The only variables of the environment that a courier gets. None of them holds a password, as one
# for the records' database might, whatever it is called.
TO_COURIER = {
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR"),
    *("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONHOME", "PYTHONUTF8", "PYTHONDONTWRITEBYTECODE"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    *("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "RES_OPTIONS", "LOCALDOMAIN"),
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
    *("HF_HUB_OFFLINE", "USE_HUB_KERNELS", "FEDTUNE_OFFLINE", "FEDTUNE_STRICT", "FEDTUNE_DEBUG"),
    *("GRPC_VERBOSITY", "PGPASSFILE", "PGSERVICEFILE", "PGSSLKEY"),  # the last three are paths
}
_log = logging.getLogger("fedtune.client")
MOST_LOGGED = 2**20  # most bytes in the log of a process of a site
FULL = b"\n(this log is full: nothing after it is kept until its process is started again)\n"
STOP_SECONDS = 10.0  # pause between SIGTERM and SIGKILL


@contextmanager
def interruptible() -> Iterator[None]:
    """A context manager: at the first SIGTERM or SIGINT, raise Stopped in the block. Later signals
    are ignored, so that the block can clean up.

    In any thread except the main one, signals are left as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping = False

    def handle(signum: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise Stopped(signum)

    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, handle) for number in signals]
    try:
        yield
    finally:
        stopping = True
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


class Child:
    """One running program, Flower's or fedtune's; a context manager that stops it.

    - program: the program to start, by its name in PROGRAMS
    - options: its command line, after the program's name
    - home: the folder in which Flower keeps its files (FLWR_HOME), made if it is missing
    - log: the file that its output goes to, which only this user can read. Starting the program
      empties an earlier log, except for "rank", which starts while a site answers a request: its
      caller must have emptied the log before, by `begin_log`. A process of a site (AT_A_SITE) can
      write MOST_LOGGED bytes, and the rest is dropped
    - keep: numbers of this process's open files that the program inherits

    The program inherits all environment variables, except that a courier gets only those in
    TO_COURIER. Flower's telemetry and update checks are switched off."""

    def __init__(
        self,
        program: Program,
        options: Sequence[str],
        *,
        home: Path,
        log: Path,
        keep: Sequence[int] = (),
    ) -> None:
        self.program, self.log = program, log
        self._name = PROGRAMS[program][1]
        private_folder(home)
        private_folder(log.parent)
        inherited = boot.environment()
        if program == "courier":
            inherited = {name: inherited[name] for name in inherited.keys() & TO_COURIER}
        environment = {
            **inherited,
            **QUIET,
            "FLWR_HOME": str(home),
            "PYTHONUNBUFFERED": "1",
        }
        # A courier may write no file on this disk, not even its log. How much a vault and its other
        # processes print depends on records and on a courier's requests, so it is limited.
        pipe = program in AT_A_SITE
        if pipe and program != "rank":  # a rank starts in the midst of an order: begin_log before
            begin_log(log)
        with ExitStack() as opened:
            sink = None if pipe else opened.enter_context(open(log, "wb", opener=_open_private))
            self._process = subprocess.Popen(
                boot.command("fedtune.core.processes", program, *options),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if pipe else sink,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=keep,
            )
        if pipe:
            keep_output(self._process, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self.status is None

    @property
    def status(self) -> int | None:
        """The child's exit status once it has ended; None while it runs."""
        return self._process.poll()

    def has_logged(self, text: str) -> bool:
        """Return whether the child's output contains `text`."""
        return text.encode() in self.log.read_bytes()

    def build_end_error(self) -> InfrastructureError:
        """Build the error for a child that ended by itself."""
        return InfrastructureError(
            f"{self._name} ended by itself (exit status {self.status})",
            todo=f"read {self.log}",
        )

    def wait(self) -> None:
        """Wait until the child has ended. Errors: InfrastructureError if its exit status is not
        0."""
        if self._process.wait() != 0:
            raise self.build_end_error()

    def wait_for_port(self, host: str, port: int, seconds: float = 60.0) -> None:
        """Wait until the child listens on a port. Errors: InfrastructureError if the child ends
        before, or does not listen within `seconds`."""
        deadline = time.monotonic() + seconds
        while not is_reachable(host, port):
            if not self.alive:
                raise self.build_end_error()
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"{self._name} does not listen on {host}:{port} after {seconds:.0f} s",
                    todo=f"read {self.log}",
                )
            time.sleep(0.05)
        if not self.alive:  # another program holds the port and answered in its place
            raise self.build_end_error()

    def stop(self) -> None:
        """End the child: by SIGTERM and, if it still runs after STOP_SECONDS, by SIGKILL. A second
        call does nothing."""
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextmanager
def alone(folder: Path, who: str) -> Iterator[bool]:
    """A context manager: hold the lock of `folder` within the block, so that no other process uses
    the folder. Yield whether the process that held it last was killed. The folder is made if it is
    missing. The lock is released at the end of the block, or when the process ends for whatever
    reason. who: the words by which the error names a process that holds the lock.

    Errors: InfrastructureError if another process holds the lock, or the disk refuses."""
    lock = folder / "lock"
    with locks.mapping_errors(lock):
        private_folder(folder.parent)
        private_folder(folder)
    with locks.hold_alone(lock, who, folder.parent) as killed:
        yield killed


def private_folder(path: Path) -> Path:
    """Create the folder `path`, readable by this user only, if it does not exist. Return `path`."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def is_reachable(host: str, port: int) -> bool:
    """Return whether something accepts TCP connections at this address."""
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except (OSError, UnicodeError):  # UnicodeError: of a name that no machine has
        return False
    return True


def begin_log(log: Path) -> None:
    """Empty the log of a process of a site, and reserve the MOST_LOGGED bytes of disk space that it
    may take. If the disk does not have them, remove the log, since it would grow into the space
    that the ledger needs, and log a warning.

    Do not call this while the site answers a request of the coordinator: the log would take the
    space that was set aside for the answer."""
    has_space = False
    with suppress(OSError):
        private_folder(log.parent)
        with open(log, "wb", opener=_open_private) as file:
            has_space = reserve(file.fileno(), MOST_LOGGED + len(FULL))
    if not has_space:
        with suppress(OSError):
            log.unlink()
        _log.warning(
            "%s: the disk lacks the %d bytes that this log may take, so what the process prints is "
            "not kept; to do: free space, then start again",
            log,
            MOST_LOGGED,
        )


def keep_output(process: subprocess.Popen[bytes], log: Path) -> None:
    """Start a thread that appends what a process prints to its log. process: the process, whose
    output is a pipe; log: the file, which `begin_log` has made."""
    assert process.stdout
    threading.Thread(target=_write_log, args=(process.stdout, log), daemon=True).start()


def _write_log(output: IO[bytes], log: Path) -> None:
    """Append what a process of a site prints to its log, until the process ends. The log takes the
    MOST_LOGGED bytes that `begin_log` reserved; what is printed after that is dropped."""
    with output, ExitStack() as opened:
        sink, left = None, 0
        with suppress(FileNotFoundError):
            file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            sink = opened.enter_context(open(file, "wb", buffering=0))
            left = max(0, MOST_LOGGED - os.fstat(file).st_size)
        while said := os.read(output.fileno(), 65_536):
            kept = said[:left]
            left -= len(kept)
            if sink and kept:
                with suppress(OSError):
                    sink.write(kept if left else kept + FULL)


def _open_private(path: str, flags: int) -> int:
    """Open a file, and return its descriptor. A new file can be read by this user only. Errors:
    OSError if the path is a link, which a courier may have put there."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def end_with_parent() -> None:
    """Start a thread that waits until this process's standard input ends, which means that its
    parent has ended, and then stops this process: by SIGTERM and, if it still runs after
    STOP_SECONDS, at once."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _main(program: Program) -> None:
    """Run a program of PROGRAMS with the options in sys.argv."""
    if program not in CONFINED:
        end_with_parent()
    if program in AT_A_SITE:
        # To show the line of a warning, Python reads it from a library's file: which files are
        # read would depend on records.
        warnings.simplefilter("ignore")
        # A module's byte code is a new file in a folder whose names the courier may list.
        sys.dont_write_bytecode = True
        # Else the first text that is tokenised would start a thread for each processor, and a
        # plan's labels decide whose text is first. Every account of the machine can count threads.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    boot.hide_quantisation()
    import_module(PROGRAMS[program][0]).main(sys.argv[1:])


if __name__ == "__main__":
    named = next(program for program in PROGRAMS if program == sys.argv[1])
    sys.argv = [f"flower-{named}", *sys.argv[2:]]
    _main(named)
