"""Sites on the nodes of a real Ray cluster: two nodes, at two loopback addresses."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedtune.core.config import load_site, load_study
from fedtune.core.errors import InfrastructureError
from fedtune.core.ledger.ledger import Ledger
from fedtune.evidence.verify import verify
from fedtune.launch import ray as engine
from fedtune.launch.simulate import simulate
from fedtune.officer.site_files import sites_in
from tests.flower.test_pool import open_world
from tests.secagg.world import adapter_of, lay_out
from tests.server.test_simulate import SITE, world

ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
pytestmark = pytest.mark.long

__all__ = ["open_world", "world"]
NODE = {"include_dashboard": False, "object_store_memory": 80 << 20}
RECEIVE_BUFFER = 33  # SO_RCVBUFFORCE, without the limit of SO_RCVBUF
HEAD, OTHER = "127.0.0.2", "127.0.0.3"  # Ray would replace 127.0.0.1


@contextmanager
def cluster_of(*nodes: dict[str, Any]) -> Iterator[Any]:
    """A cluster with these nodes, the first its head; its processes alone end with the block."""
    os.environ.update(engine.THERE)
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    # Ray writes there whichever folder a cluster has; a machine without an earlier Ray has none.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        cluster = Cluster()
        try:
            for number, node in enumerate(nodes):
                at = {"node_ip_address": OTHER} if number else {"node_ip_address": HEAD}
                here = {} if number else {"temp_dir": f"{folder}/ray"}
                try:
                    cluster.add_node(**NODE, **at, **here, **node)
                except Exception as error:
                    if "timed out during startup" not in str(error):
                        raise
                    pytest.skip("this machine is too busy for Ray, which waits half a minute")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """Two nodes with the test's own cache of bases, which is in their environment."""
    with cluster_of({"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        yield cluster


class Said:
    """What is told to relays and what they answer, and where they are."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.told: list[Any] = []
        self.answers: list[bytes] = []
        self.grids: list[engine.RayGrid] = []
        worker, enter = engine._RayWorker, engine.RayGrid.__enter__
        begin, send, receive = worker.begin, worker.send, worker.receive

        def entered(grid: engine.RayGrid) -> engine.RayGrid:
            self.grids.append(grid)
            return enter(grid)

        def told(of: Any, *marks: Any) -> Any:
            class Spy:
                begin = of.relay.begin

                @classmethod
                def remote(cls, *options: Any) -> Any:
                    self.told.append(options)
                    return cls.begin.remote(*options)

            relay, of.relay = of.relay, type("Relay", (), {"begin": Spy})
            begun = begin(of, *marks)
            of.relay = relay
            return begun

        def sent(of: Any, identity: str, message_bytes: bytes) -> None:
            self.told.append(message_bytes)
            send(of, identity, message_bytes)

        def received(of: Any) -> tuple[bytes, bytes]:
            answer = receive(of)
            self.answers.append(answer[1])
            return answer

        patch.setattr(engine.RayGrid, "__enter__", entered)
        patch.setattr(worker, "begin", told)
        patch.setattr(worker, "send", sent)
        patch.setattr(worker, "receive", received)

    def node_of(self, site: str) -> str:
        """The number of the node that has a site's process."""
        workers = self.grids[-1]._workers
        return next(
            str(w.node) for w in workers for path in w.sites.values() if f"site-{site}." in path
        )


def steps_of(folder: Path) -> list[str]:
    """A site's step log, without what differs between two runs."""
    lines = (folder / "steps.jsonl").read_text().splitlines()
    return [re.sub(r'"(time|began|seconds|at)": ?[^,}]*', "", line) for line in lines]


def test_two_nodes_make_what_one_process_makes(open_world, two_nodes, monkeypatch):
    """σ = 0: every bit of the adapter and of the state, every measurement, the sites' books. What
    Ray is told is paths, messages and numbers, and no text of a record is in it."""
    said, runs = Said(monkeypatch), []
    joined = {"engine": "ray", "address": two_nodes.address, "processes": 2}
    for kind, options in (("one", {}), ("ray", joined)):
        for name in "abc":
            site = SITE.format(name=name) + "allow_privacy_off = true\n"
            site = site.replace(f"state-{name}", f"state-{name}-{kind}")
            (open_world / f"site-{name}.toml").write_text(site)
        sites = list(map(load_site, sites_in(open_world)))
        study = load_study(open_world / "study.toml")
        runs.append(simulate(study, sites, open_world / kind, **options))
        assert verify(open_world / kind).signer
    assert len({worker.node for worker in said.grids[0]._workers}) == 2
    one, under_ray = (run.report for run in runs)
    assert one["quality"] == under_ray["quality"]
    assert [r["participants"] for r in under_ray["rounds"]] == [["a", "b", "c"]] * 2
    for part in ("adapter/adapter_model.safetensors",):
        expected, found = (load_file(open_world / kind / part) for kind in ("one", "ray"))
        assert expected.keys() == found.keys()
        assert all((expected[name] == found[name]).all() for name in expected)
    for name in "abc":
        folders = [open_world / f"state-{name}-{kind}" for kind in ("one", "ray")]
        assert steps_of(folders[0]) == steps_of(folders[1])
        books = [Ledger(folder).charges("records") for folder in folders]
        assert [len(book) for book in books] == [len(books[0])] * 2

    texts = ["help?", "does 3", "will 3"]
    for told in said.told:
        if isinstance(told, bytes):
            assert not any(text.encode() in told for text in texts)
        else:
            digests, marks, log, paths, share, peers, threads = told
            assert all(map(os.path.isabs, [*digests, *marks, log, *paths.values()]))
            assert {len(digest) for digest in digests.values()} == {64} and peers == ""
            assert share == (0, 1)
            assert threads == os.environ.get("OMP_NUM_THREADS", "")
    assert said.answers
    assert not any(text.encode() in answer for text in texts for answer in said.answers)
    assert any(b"tiny" in told for told in said.told if isinstance(told, bytes)), "the twin"
    assert not list(open_world.rglob(".ray-*"))


@pytest.mark.long
def test_a_cluster_of_another_ray_or_python_is_named(world, two_nodes, monkeypatch):
    monkeypatch.setattr(ray, "__version__", "2.0.0")
    with pytest.raises(InfrastructureError, match=r"has another Ray or Python: .* Ray 2\.0\.0"):
        run(world, two_nodes)
    assert not (world / "out").exists()


def run(world: Path, cluster: Any, **options: Any) -> Any:
    """A run of the world's study and sites on a cluster, with two processes."""
    study, sites = load_study(world / "study.toml"), list(map(load_site, sites_in(world)))
    options = {"engine": "ray", "processes": 2, "address": cluster.address} | options
    return simulate(study, sites, world / "out", **options)


def charges(world: Path, site: str) -> int:
    return len(Ledger(world / f"state-{site}").charges("records"))


@pytest.mark.long
@pytest.mark.parametrize("when", ["before its charge", "after its charge"])
def test_a_node_that_is_lost_in_mid_round_costs_no_round(world, monkeypatch, when):
    """The other node takes its site, which pays for every answer that it gives."""
    said, lost, held = Said(monkeypatch), list[str](), ExitStack()
    text = (world / "study.toml").read_text()
    (world / "study.toml").write_text(text.replace("rounds = 2", "rounds = 3"))
    with cluster_of({"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        head, other = cluster.list_all_nodes()

        def on_event(kind: str, data: dict[str, Any]) -> None:
            if kind == "begin" and data["round"] == 2:
                lost.extend(site for site in "ab" if said.node_of(site) == other.node_id)
                if when == "before its charge":
                    ledger = sqlite3.connect(world / f"state-{lost[0]}" / "ledger.db")
                    held.enter_context(closing(ledger)).execute("BEGIN EXCLUSIVE")
            if kind == "site" and data["round"] == 2 and other in cluster.list_all_nodes():
                while when == "after its charge" and charges(world, lost[0]) < 2:
                    time.sleep(0.05)
                cluster.remove_node(other, allow_graceful=False)
                held.close()

        body = run(world, cluster, on_event=on_event).report
        assert said.node_of(lost[0]) == head.node_id or when == "after its charge"
    assert [entry["participants"] for entry in body["rounds"]] == [["a", "b"]] * 3
    paid = charges(world, lost[0])
    assert paid == 3 if when == "before its charge" else 3 <= paid <= 4
    assert charges(world, "a" if lost[0] == "b" else "b") == 3
    assert verify(world / "out").signer


@pytest.mark.long
def test_a_lost_node_without_another_ends_in_an_error_and_resume_finishes(world, monkeypatch):
    with cluster_of({"num_cpus": 0}, {"num_cpus": 1}) as cluster:
        _, other = cluster.list_all_nodes()

        def on_event(kind: str, data: dict[str, Any]) -> None:
            if kind == "round":
                monkeypatch.setattr(engine, "START_SECONDS", 20.0)
                cluster.remove_node(other, allow_graceful=False)

        with pytest.raises(InfrastructureError, match=r"process of the sites .*--resume"):
            run(world, cluster, on_event=on_event)
        assert {charges(world, site) for site in "ab"} <= {1, 2}
    body = simulate(
        load_study(world / "study.toml"),
        list(map(load_site, sites_in(world))),
        world / "out",
        resume=True,
    ).report
    assert [entry["participants"] for entry in body["rounds"]] == [["a", "b"]] * 2
    paid = {site: charges(world, site) for site in "ab"}
    assert all(2 <= steps <= 3 for steps in paid.values())  # 3: paid, then lost with its answer
    assert verify(world / "out").signer


@pytest.mark.long
def test_shared_noise_and_two_nodes(tmp_path, tiny_base):
    """All of a site's messages reach the process that holds its draw: no attempt is void."""
    with cluster_of({"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        study, sites = lay_out(tmp_path / "private", tiny_base, epsilon=6.0)
        joined = {"engine": "ray", "address": cluster.address, "processes": 2}
        body = simulate(study, sites, tmp_path / "private" / "run", **joined).report
        assert [len(entry["participants"]) for entry in body["rounds"]] == [3, 3]
        for site in sites:
            assert len(Ledger(site.home).charges("records")) == 2
        adapters = []
        for kind, options in (("one", {}), ("ray", joined)):
            study, sites = lay_out(tmp_path / kind, tiny_base)
            adapters.append(adapter_of(simulate(study, sites, tmp_path / kind / "run", **options)))
        assert all((adapters[0][name] == adapters[1][name]).all() for name in adapters[0])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["none", "another"])
def test_a_node_with_another_fedtune_or_none_is_named(world, tmp_path_factory, kind):
    package = tmp_path_factory.mktemp("elsewhere")
    if kind == "none":
        (package / "fedtune").mkdir()
        (package / "fedtune" / "__init__.py").write_text("raise ImportError('none here')\n")
        expected = "no process of the sites .* fedtune .* in the Python of its Ray"
    else:
        (package / "sitecustomize.py").write_text("import fedtune\nfedtune.__version__ = '0.0.9'\n")
        expected = r"has fedtune 0\.0\.9"
    elsewhere = {"num_cpus": 1, "env_vars": {"PYTHONPATH": str(package)}}
    with (
        cluster_of({"num_cpus": 0}, elsewhere) as cluster,
        pytest.raises(InfrastructureError, match=expected),
    ):
        run(world, cluster)
    assert not (world / "out").exists()


@pytest.mark.long
def test_a_node_with_folders_of_its_own_is_told_what_is_needed(world):
    """A node in a mount namespace, where the sites' state folders are empty."""
    private = ["unshare", "--mount", "--propagation", "private"]
    hidden = world / "state-a"
    if os.geteuid() or subprocess.run([*private, "true"]).returncode:
        pytest.skip("only root makes a mount namespace here")
    hidden.mkdir(mode=0o700)
    with cluster_of({"num_cpus": 0}) as cluster:
        start = f"mount -t tmpfs none {hidden} && exec ray start --block --num-cpus=1 "
        start += f"--address={cluster.address} --node-ip-address={OTHER} "
        start += f"--object-store-memory={80 << 20} --min-worker-port=0 --max-worker-port=0"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        node = subprocess.Popen(
            [*private, "sh", "-c", start],
            env={**os.environ, "PATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while len(cluster.global_state.node_table()) < 2:
                assert node.poll() is None
                time.sleep(0.1)
            with pytest.raises(
                InfrastructureError, match=rf"{hidden} is missing .* file system that all nodes"
            ):
                run(world, cluster)
        finally:
            node.terminate()
            node.wait()
    assert not (world / "out").exists()


@pytest.mark.long
def test_no_record_crosses_the_network(world):
    """Every packet on loopback, where the two nodes' network is: the study's name is in them, and
    the texts of the records are not."""
    try:
        listening = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    except OSError:
        pytest.skip("only root reads packets here")
    listening.bind(("lo", 0))
    listening.setsockopt(socket.SOL_SOCKET, RECEIVE_BUFFER, 256 << 20)
    listening.settimeout(0.5)
    seen, over = {text: 0 for text in (b"help?", b"does 3", b'"tiny"', b"site-a.toml")}, []

    def listen() -> None:
        while not over:
            try:
                packet = listening.recv(1 << 17)
            except TimeoutError:
                continue
            for text in seen:
                seen[text] += packet.count(text)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        with cluster_of({"num_cpus": 0}, {"num_cpus": 2}) as cluster:
            run(world, cluster)
    finally:
        over.append(True)
        thread.join()
        listening.close()
    assert seen[b"site-a.toml"] and seen[b'"tiny"']
    assert not seen[b"help?"] and not seen[b"does 3"]


@pytest.mark.long
def test_without_an_address_ray_begins_and_ends_here_and_is_closed_to_others(world):
    """By the command line: Ray listens on loopback alone, lets nobody in without the run's token,
    imports nothing from the current folder, and is gone afterwards."""
    (world / "psutil.py").write_text("raise SystemExit('of the current folder')\n")
    before = set(Path("/tmp").glob("fedtune-*/ray"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [Path(sys.executable).with_name("fedtune"), "simulate", "study.toml"]
    command += ["--engine", "ray", "--processes", "2", "--out", "out"]
    with open(world / "said", "wb") as said:
        process = subprocess.Popen(
            list(map(str, command)), cwd=world, env=environment, stdout=said, stderr=said
        )
    ports: set[str] = set()
    refused = ""
    while process.poll() is None:
        shown = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
        family = _descendants(process.pid)
        for line in shown.splitlines():
            if family & set(map(int, re.findall(r"pid=(\d+)", line))):
                ports.add(line.split()[3])
            if not refused and "gcs_server" in line and line.split()[3] in ports:
                refused = _join("127.0.0.1:" + line.split()[3].rpartition(":")[2], environment)
        time.sleep(0.2)
    assert process.returncode == 0, (world / "said").read_text()
    assert "Authentication" in refused or "Failed to connect" in refused, refused
    assert ports and all("127.0.0.1" in port or "[::1]" in port for port in ports), ports
    assert set(Path("/tmp").glob("fedtune-*/ray")) == before
    assert (world / "out" / "report.json").exists()


def _join(address: str, environment: dict[str, str]) -> str:
    code = f"import ray; ray.init(address={address!r}, logging_level=50); print('joined')"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "Failed to connect"
    return done.stdout + done.stderr


def _descendants(pid: int) -> set[int]:
    """The processes that a process started, and theirs."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    parents = dict(map(int, line.split()) for line in table.stdout.splitlines())
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found
