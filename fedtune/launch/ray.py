"""Run the processes of a simulation's sites on the nodes of a Ray cluster.

    coordinator: RayGrid ── Ray, bytes of Flower's own messages ──> Relay, an actor on a node
                                 Relay ── socket pair on that node ──> a process: some sites

A whole site runs in one process, which its relay starts in the same way as `--processes` does on
one machine. Only that process opens the site's records and ledger, and its output goes only to its
log. Ray carries paths, digests and versions, the messages that a coordinator sends, and the answers
that it would get from a hospital. Ray carries no record, and no sum without noise. What it carries
is neither encrypted nor authenticated, unless the cluster is set up for it.

All nodes must see the same folders of the run and of the sites, and each other's locks in these
folders. Else a site whose node was lost could continue on another node with an older ledger, and be
charged too little.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.core.config import load_site
from fedtune.core.errors import ConfigError, FedtuneError, InfrastructureError
from fedtune.core.files import locks
from fedtune.core.processes import STOP_SECONDS, is_reachable, private_folder
from fedtune.launch.process_pool import PAUSE, ProcessGrid, Sites, Worker

LOOPBACK = "127.0.0.1"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
# With clustering, Ray would replace 127.0.0.1 by an address that other machines can reach.
HERE = QUIET | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# The number of tries to reach a cluster, half a minute each; Ray's default is 20 tries.
THERE = QUIET | {"RAY_gcs_server_port_wait_time_s": "2"}
Marks = tuple[dict[str, str], list[str]]  # site file -> digest; files whose locks are held
START_SECONDS = 300.0  # time for Ray to find a free processor and start an actor on a busy node
THREADS = "OMP_NUM_THREADS"


class RayGrid(ProcessGrid):
    """A ProcessGrid whose processes run on the nodes of a Ray cluster.

    - sites: the sites' files
    - processes: the number of processes, to which the sites are dealt out in turn; at most one for
      each site is used
    - logs: the folder for the processes' logs and the sites' locks
    - peers: the signing keys of all sites, separated by spaces; "" without secure aggregation
    - address: the address of a running cluster, "auto" or HOST:PORT; this cluster keeps running
      afterwards. With "" the grid starts a cluster on this machine, with one processor for each
      process, and ends it afterwards.

    All nodes must see `sites` and `logs`, whose paths are made absolute.

    Guarantee: Ray delivers a message once or not at all. If a node is lost, the requests to its
    sites fail. The next message to such a site starts a process on another node, which waits until
    the lost process has released the site. An error that a site's records cause is written only to
    the log of the site's process.
    Errors: ConfigError, InfrastructureError when the grid is opened or a process is replaced."""

    def __init__(
        self, sites: Sequence[Path], processes: int, logs: Path, peers: str, address: str = ""
    ) -> None:
        self._files = [path.absolute() for path in sites]
        self._logs, self._address = logs.absolute(), address
        self._marks: Marks = {}, []
        self._lost = set[str]()  # nodes on which a process has ended
        self._opened = ExitStack()
        super().__init__(self._files, processes, self._logs, peers)

    def _worker(self, *options: Any) -> Worker:
        return _RayWorker(*options)

    def __enter__(self) -> RayGrid:
        with ExitStack() as opened:
            opened.enter_context(_connected(self._address, len(self._workers)))
            folders = [self._logs, *(load_site(path).home.absolute() for path in self._files)]
            self._marks = opened.enter_context(_marked(self._files, folders))
            opened.callback(super().__exit__)
            self._start(self._workers)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _feed(self, worker: Any) -> None:
        if worker.queue and worker.relay is None:
            self._lost.add(worker.node)  # Ray may take it for alive for half a minute
            self._start([worker])
        super()._feed(worker)

    def _await(self, busy: list[Any]) -> Worker | None:
        import ray

        ready, _ = ray.wait([worker.answer for worker in busy], timeout=PAUSE)
        return next((worker for worker in busy if worker.answer in ready), None)

    def _start(self, workers: list[Any]) -> None:
        """Start a process for each of these workers, and wait until all have started. The processes
        are placed one by one, each on the node where the number of processors, divided by the
        number of processes there (the new one included), is largest. A node on which a process has
        ended is used only if there is no other. Errors: InfrastructureError."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        cores = {
            node["NodeID"]: node["Resources"]["CPU"]
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU")
        }
        if not cores:
            raise InfrastructureError(
                "no node of the Ray cluster has a processor for a process of the sites",
                "a node with a processor",
                "add a node with `ray start --address HOST:PORT`, then go on with --resume",
            )
        sound = set(cores) - self._lost or set(cores)
        before = Counter[str](worker.node for worker in self._workers if worker.relay)
        there = Counter[str](before)
        for worker in workers:
            worker.node = max(sound, key=lambda node: cores[node] / (1 + there[node]))
            there[worker.node] += 1
        begun = []
        for worker in workers:
            at = NodeAffinitySchedulingStrategy(worker.node, soft=True)
            relay = ray.remote(Relay).options(scheduling_strategy=at, max_concurrency=2)
            worker.relay = relay.remote()
            share = before[worker.node], there[worker.node]
            before[worker.node] += 1
            begun.append(worker.begin(*self._marks, share))
        try:
            for seen in ray.get(begun, timeout=START_SECONDS):
                _check_node(*seen)
        except ray.exceptions.RayError as error:
            raise _start_error(error) from None


class _RayWorker(Worker):
    """A worker whose process is on a node of the cluster. A relay on that node passes the messages
    to the process and back."""

    relay: Any = None
    answer: Any = None  # Ray's reference to what the relay will return
    node = ""  # Ray's name of the node

    def begin(self, digests: dict[str, str], marks: list[str], share: tuple[int, int]) -> Any:
        """Ask the relay to start the process; do not wait for it. Return Ray's reference to what
        `Relay.begin` will return.

        - digests: site file -> sha256 of its content here
        - marks: paths of files whose locks this process holds, one in each folder that all nodes
          must share
        - share: (number of this process on its node, from 0; number of processes on that node)"""
        options = str(self.log), self.sites, share, self.peers, os.environ.get(THREADS, "")
        return self.relay.begin.remote(digests, marks, *options)

    def send(self, identity: str, message_bytes: bytes) -> None:
        self.busy, self.message_bytes = identity, message_bytes
        self.answer = self.relay.answer.remote(message_bytes)

    def receive(self) -> tuple[bytes, bytes]:
        import ray

        try:
            return b"{}", ray.get(self.answer)
        except ray.exceptions.RayError:
            raise EOFError from None

    def stop(self) -> None:
        import ray

        relay, self.relay = self.relay, None
        if relay is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(relay.end.remote(), timeout=2 * STOP_SECONDS)
            ray.kill(relay)


class Relay:
    """A Ray actor that starts a process on its node, in which some sites run, and passes messages
    to that process."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def begin(
        self,
        digests: dict[str, str],
        marks: list[str],
        log: str,
        sites: Sites,
        share: tuple[int, int],
        peers: str,
        threads: str,
    ) -> tuple[str, str, str]:
        """Start the process of these sites, unless the coordinator's files or folders differ on
        this node.

        - digests: site file -> sha256 of its content at the coordinator, for all sites of the run
        - marks: paths of files whose locks the coordinator holds, one in each folder that all nodes
          must share
        - log: the path of the file for the process's output
        - sites: node number -> site file, for the sites of this process
        - share: (number of this process on this node, from 0; number of processes on this node)
        - peers: the signing keys of all sites, separated by spaces; "" without secure aggregation
        - threads: the coordinator's OMP_NUM_THREADS, which the process gets in place of the value
          that Ray sets; "" for none

        Returns the node's host name, its release of fedtune, and a text that lists the differences,
        "" if there are none and the process was started."""
        seen = socket.gethostname(), __version__, _differences(digests, marks)
        if not seen[2]:
            os.environ.pop(THREADS, None)
            if threads:
                os.environ[THREADS] = threads
            self._worker = Worker(Path(log), sites, share, peers)
            self._worker.start()
        return seen

    def answer(self, message_bytes: bytes) -> bytes:
        """Send a message, as bytes, to the process that this relay started, and return the
        process's reply. Errors: EOFError, OSError if the process has ended."""
        assert self._worker
        self._worker.send("relayed", message_bytes)
        _, reply = self._worker.receive()
        return reply

    def end(self) -> None:
        """End the process that this relay started, even while it works."""
        if self._worker:
            self._worker.stop()


@contextmanager
def _connected(address: str, processes: int) -> Iterator[None]:
    """A context manager that joins the Ray cluster at `address` while its block runs. If `address`
    is "", it starts a cluster on this machine with `processes` processors, and ends that cluster
    after the block. Errors: ConfigError, InfrastructureError."""
    if importlib.util.find_spec("ray") is None:
        raise InfrastructureError(
            "the ray engine is not installed", todo="pip install 'fedtune[ray]'"
        )
    _check_address(address)
    os.environ.update(THERE if address else HERE)
    if not address and not {"ray", "RAY_AUTH_MODE"} & {*sys.modules, *os.environ}:
        # With a token, nobody else on this machine can run programs as this user through Ray's
        # ports. Ray reads these two variables once, when it is imported.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    if ray.is_initialized():
        raise InfrastructureError(
            "this process has joined a Ray cluster already",
            "a process in which Ray is not in use",
            "call ray.shutdown() first",
        )
    options: dict[str, Any] = {"address": address}
    with tempfile.TemporaryDirectory(prefix="fedtune-", dir="/tmp") as folder:  # a short name
        if not address:
            options = {
                "address": "local",  # not one that RAY_ADDRESS or a file in /tmp names
                "num_cpus": processes,
                "include_dashboard": False,
                "_node_ip_address": LOOPBACK,
                "_temp_dir": str(Path(folder) / "ray"),  # Ray lets everybody write to it
            }
        try:
            with _as_before(Path(folder)):
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # if a node is slow to start, Ray raises Exception itself
            ray.shutdown()
            raise _join_error(error, address) from None
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _as_before(folder: Path) -> Iterator[None]:
    """A context manager that makes `folder` the current folder while its block runs, since Ray
    passes the current folder to its workers, and these must not import anything from the folder in
    which the user works. After the block, the former folder and the former handler of SIGTERM,
    which Ray replaces, are restored."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with chdir(folder):
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _marked(files: Sequence[Path], folders: Sequence[Path]) -> Iterator[Marks]:
    """A context manager: for the length of the block, keep a new, locked file in each of `folders`,
    and yield what another node needs to check that it sees the same folders and files as this
    process: a dict from site file to the sha256 of its content, and a list of the new files' paths.
    At the end, delete the new files.

    - files: the sites' files
    - folders: the folders that all nodes must share"""
    with ExitStack() as held:
        marks = []
        for folder in map(private_folder, dict.fromkeys(folders)):
            mark = folder / f".ray-{secrets.token_hex(8)}"
            held.callback(mark.unlink, missing_ok=True)
            held.enter_context(locks.hold(mark))
            marks.append(str(mark))
        yield {str(path): _digest(path) for path in files}, marks


def _differences(digests: Mapping[str, str], marks: Sequence[str]) -> str:
    """Return a text that lists the coordinator's files and folders that differ on this machine; ""
    if none do.

    - digests: site file -> sha256 of its content at the coordinator
    - marks: paths of files whose locks the coordinator holds. A folder whose file is missing or not
      locked here is not the same folder."""
    wrong = []
    for path, digest in digests.items():
        with suppress(OSError):
            if _digest(Path(path)) == digest:
                continue
        wrong.append(f"{path} is missing or another file")
    for mark in map(Path, marks):
        if not mark.is_file():
            wrong.append(f"{mark.parent} is missing or another folder")
            continue
        try:
            with locks.hold_if_free(mark) as free:
                if free:
                    wrong.append(f"locks in {mark.parent} do not hold")
        except FedtuneError:
            wrong.append(f"files in {mark.parent} cannot be locked")
    return "; ".join(wrong)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_address(address: str) -> None:
    """Check that something listens at `address`, HOST:PORT; the values "" and "auto" are not
    checked. Errors: ConfigError if `address` has another form; InfrastructureError if nothing
    listens there."""
    if address in ("", "auto"):
        return
    host, _, port = address.rpartition(":")
    if "/" in host or not (host and port.isdecimal()):
        raise ConfigError(f"--address {address}", "auto, or HOST:PORT as `ray start` prints it")
    if not is_reachable(host, int(port)):
        raise InfrastructureError(
            f"nothing answers at {address}",
            "the address of a running Ray cluster",
            "start one with `ray start --head`, whose output names its address",
        )


def _join_error(error: Exception, address: str) -> InfrastructureError:
    """Build the error that says why no cluster was joined or started. error: what Ray raised.
    address: the address of the cluster that was to be joined; "" if a cluster was to be started on
    this machine."""
    import ray

    text = " ".join(str(error).split())
    if "Version mismatch" in text:
        here = f"Ray {ray.__version__} and Python {platform.python_version()}, as here"
        return InfrastructureError(
            f"the Ray cluster at {address} has another Ray or Python: {text[:400]}",
            f"{here}, on every node",
            "install these on the cluster, or run this command where the cluster's versions are",
        )
    if address:
        return InfrastructureError(
            f"the Ray cluster at {address} was not joined ({type(error).__name__}: {text[:200]})",
            "a running cluster of which this machine is a node",
            "run `ray start --address HOST:PORT` here; with no cluster yet, `ray start --head`",
        )
    return InfrastructureError(
        f"Ray did not start on this machine ({type(error).__name__}: {text[:200]})",
        todo="leave --engine ray out: --processes N needs no Ray",
    )


def _start_error(error: Exception) -> InfrastructureError:
    """Build the error that says why a node started no process. error: what Ray raised."""
    import ray

    if isinstance(error, ray.exceptions.GetTimeoutError):
        return InfrastructureError(
            f"the Ray cluster started no process of the sites in {START_SECONDS:.0f} seconds",
            "a node with a free processor",
            "`ray status` shows what is in use: free a processor or add a node, then go on with "
            "--resume",
        )
    return InfrastructureError(
        f"a node of the Ray cluster started no process of the sites ({type(error).__name__})",
        f"a node that keeps running, with fedtune {__version__}, as here, in the Python of its Ray",
        "`ray status` shows if a node was lost; if not, install fedtune there; then go on with "
        "--resume",
    )


def _check_node(host: str, release: str, wrong: str) -> None:
    """Check that a node has this release of fedtune and sees the coordinator's files and folders.

    - host: the node's host name
    - release: its release of fedtune
    - wrong: the text that lists the differing files and folders; "" if there are none

    Errors: InfrastructureError."""
    if release != __version__:
        raise InfrastructureError(
            f"node {host} of the Ray cluster has fedtune {release}",
            f"fedtune {__version__}, as here, on every node",
            "install this release there, then go on with --resume",
        )
    if wrong:
        raise InfrastructureError(
            f"on node {host} of the Ray cluster {wrong}",
            "the run's folder, and each site's site.toml, records and state, at the same paths on "
            "a file system that all nodes share, with locks that hold among them",
            "move these to such a file system, or leave --address out to run all sites here",
        )
