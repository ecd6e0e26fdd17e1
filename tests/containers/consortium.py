"""docker-compose.yml as it is, under podman-compose: enrol, train, kill, upgrade; nothing gets out.

What is changed of the example is its plan and policies: a tiny base, σ = 0. An address that nobody
answers, on an interface of this test's, stands for the world outside, and so does a name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import fedtune
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger
from tests.containers import undisturbed
from tests.containers.images import IMAGES
from tests.containers.machine import ROOT, Machine
from tests.network.kit import records

SITES = ("north", "south", "west")
COURIERS = tuple(f"{name}-courier" for name in SITES)
OWNER = 10001
ROUNDS = 16  # rounds go on while a running coordinator is looked at, and while others restart
OUTSIDE, LINK, FAR, TABLE = "10.253.0.2", "fedtune-out", "fedtune-far", "fedtune_watch"
LABEL = "fedtune-outside"  # 16 bytes with its length, which nft compares at once
ASKED = f"{LABEL}.example.org"  # nobody else on this machine looks it up
ADAPTER = "adapter/adapter_model.safetensors"
NEXT = "9.9.9"
NONE_LEFT = {"forwarded": 0, "looked_up": 0}
KNOCK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).close()
    print("reached")
except OSError as error:
    print(error.errno)
"""
# What of a site's is found below any folder: files by name, and whatever holds one of these texts.
FIND = """
import os, sys
names = {"site.key", "salt", "ledger.db", "ledger.head", "audit.jsonl", "data.jsonl"}
elsewhere = {"/proc", "/sys", "/dev", "/opt", "/usr"}
for folder, below, files in os.walk("/"):
    below[:] = [each for each in below if os.path.join(folder, each) not in elsewhere]
    for name in files:
        path = os.path.join(folder, name)
        try:
            content = open(path, "rb").read() if os.path.isfile(path) else b""
        except OSError:
            content = b""
        if name in names or any(bytes.fromhex(text) in content for text in sys.argv[1:]):
            print(path)
"""
ROUTES = """
import os
print(sorted(os.listdir("/sys/class/net")), len(open("/proc/net/route").read().splitlines()) - 1)
"""
CONFINED = {"Uid": f"{OWNER}", "CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1"}


def checks(machine: Machine) -> Iterator[str]:
    """A line for each check that held. Errors: AssertionError."""
    base = lay_out(machine)
    with outside(), cleared(machine):
        enrol(machine)
        yield from undisturbed.checks(machine)
        write_study(machine, ROUNDS)
        calm = simulated(machine, base)
        machine.timed("compose up", "podman-compose", "up", "-d", "--no-build")
        with watched(machine) as escaped:
            until(lambda: rounds(machine) >= 1, 900, machine)
            yield from confined(machine)
            yield from killed(machine)
            yield from upgraded(machine)
            until(lambda: not running(machine, "coordinator"), 1800, machine)
            code = state(machine, "coordinator")["ExitCode"]
            assert code == 0, f"the coordinator ended with {code}"
            assert escaped() == NONE_LEFT, f"left the internal networks: {escaped()}"
            yield f"{ROUNDS} rounds; the coordinator ended and stayed down; nothing got out"
        yield twin_of_the_watch(machine)
        yield charged(machine)
        found = load_file(machine.tree / "deploy/runs/study" / ADAPTER)
        assert set(found) == set(calm)
        off = max(float(np.abs(found[n] - calm[n]).max()) for n in calm)
        moved = max(float(np.abs(calm[n]).max()) for n in calm if "lora_B" in n)
        assert off <= 1e-6 < 1e-4 < moved, (off, moved)
        yield f"the adapter is that of `simulate`, to {off:.0e} (it moved by {moved:.2g})"


def lay_out(machine: Machine) -> Path:
    """Records and policies in the tree's deploy/, and the base in the volume."""
    from tests.conftest import tiny_llama

    deploy = machine.tree / "deploy"
    for name in ("coordinator", "runs", *(f"{s}/{d}" for s in SITES for d in ("post", "state"))):
        (deploy / name).mkdir()
        os.chown(deploy / name, OWNER, OWNER)
    for seed, name in enumerate(SITES):
        (deploy / name / "data").mkdir()
        records(deploy / name / "data" / "data.jsonl", seed)
        site = deploy / name / "site.toml"
        policy = '[policy]\nbases = "any"\nallow_privacy_off = true\n'
        text = site.read_text().replace("[policy]\n", policy)
        site.write_text(text.replace("[site]\n", '[site]\nbase = "/models/tiny"\n'))
    base = tiny_llama(machine.folder / "tiny")
    machine.podman("volume", "rm", "--force", "fedtune_models")
    machine.podman("volume", "create", "fedtune_models")
    volume = Path(machine.inspect("volume", "fedtune_models")["Mountpoint"])
    shutil.copytree(base, volume / "tiny", copy_function=shutil.copyfile)  # for all to read
    return base


def write_study(machine: Machine, rounds: int, *, private: bool = False) -> None:
    """The example's plan with a tiny base; without noise where it is not private."""
    changes = [
        (r"model = .*\ndigest = .*", 'model = "/models/tiny"\ndtype = "float32"'),
        (r"rank = 16\nalpha = 32", "rank = 4\nalpha = 8"),
        (r"max_length = 256", "max_length = 64"),
        (r"rounds = \d+", f"rounds = {rounds}"),
        (r"round_timeout = 3600", "round_timeout = 120"),
    ]
    if not private:
        changes += [(r"\A", 'privacy = "off"\n'), (r"\[privacy\]\n.*\n.*\n", "")]
    text = (ROOT / "deploy/study/study.toml").read_text()
    for pattern, new in changes:
        text, times = re.subn(pattern, new, text)
        assert times == 1, pattern
    (machine.tree / "deploy/study/study.toml").write_text(text)


def simulated(machine: Machine, base: Path) -> dict[str, np.ndarray]:
    """The adapter that `simulate` makes of the same plan and records, here."""
    from tests.simulated import simulate

    calm = machine.folder / "calm"
    shutil.rmtree(calm, ignore_errors=True)
    calm.mkdir()
    deploy = machine.tree / "deploy"
    text = (deploy / "study/study.toml").read_text().replace("/models/tiny", str(base))
    (calm / "study.toml").write_text(text)
    for name in SITES:
        shutil.copytree(deploy / name / "data", calm / name / "data")
        text = (deploy / name / "site.toml").read_text().split("[coordinator]")[0]
        (calm / name / "site.toml").write_text(text.replace("/models/tiny", str(base)))
    simulate(calm / "study.toml", [calm / n / "site.toml" for n in SITES], calm / "run")
    return load_file(calm / "run" / ADAPTER)


def enrol(machine: Machine) -> None:
    """As deploy/README.md says: each site asks, the coordinator admits it by its fingerprint."""
    once = ("--profile", "enrol", "run", "--rm", "-T")
    for name in SITES:
        told = machine.compose(*once, f"enrol-{name}")
        (heard,) = re.findall(r"fingerprint {2,}((?:[0-9a-f]{4} ?){5})", told)
        post = f"/post/{name}"
        machine.compose(*once, "admit", f"{post}/{name}.request", "--out", f"{post}/answer",
                        "--fingerprint", heard.strip())  # fmt: skip
        site = machine.tree / "deploy" / name
        asked = json.loads((site / "post" / "answer").read_text())
        assert asked["address"] == "coordinator:8443"
        with (site / "site.toml").open("a") as file:
            file.write(f'fingerprint = "{_consortium(machine)}"\n')


def _consortium(machine: Machine) -> str:
    from fedtune.evidence import fingerprints

    answers = (machine.tree / "deploy").glob("*/post/answer")
    answer = json.loads(next(answers).read_text())
    return fingerprints.of_consortium(answer["ca"], answer["coordinator"])


def confined(machine: Machine) -> Iterator[str]:
    """What a program in a running container can do: nothing but its work."""
    _confined(machine, "coordinator", "/coordinator/signing.key", (OUTSIDE, ASKED))
    with paused(machine, "coordinator"):  # no rounds go by meanwhile
        for site, service in zip(SITES, COURIERS, strict=True):
            places = (OUTSIDE, ASKED) if site == "north" else ()
            _confined(machine, site, "/site/site.toml", places)
            _confined(machine, service, "/site/state/keys/node.key", places)
        vault, courier = (container(machine, name) for name in ("north", "north-courier"))
        told = knock(machine, courier, address(machine, "south-courier"), 8443)
        assert told != "reached", "north reached south"
        assert knock(machine, courier, "coordinator", 8443) == "reached"
        assert knock(machine, vault, "coordinator", 8443) != "reached"
        assert machine.podman("exec", vault, "python", "-c", ROUTES).strip() == "['lo'] 0"
        assert machine.podman("exec", courier, "python", "-c", ROUTES).strip() != "['lo'] 0"
        yield "uid 10001, no capability, no new privilege, a read-only root; health checks pass"
        yield "private keys are there, and cannot be replaced from inside"
        yield "a vault has no route and no name; a courier reaches the coordinator's port alone"
        yield found(machine, vault, courier)


def found(machine: Machine, vault: str, courier: str) -> str:
    """Look for the site's records, ledger and signing key in both of its containers."""
    site = machine.tree / "deploy/north"
    record = (site / "data/data.jsonl").read_text().splitlines()[0]
    texts = [record.encode().hex(), (site / "state/site.key").read_bytes().hex()]
    for_all = [
        machine.podman("exec", each, "python", "-c", FIND, *texts) for each in (vault, courier)
    ]
    of_vault, of_courier = (set(told.split()) for told in for_all)
    assert of_courier == set(), of_courier
    twin = {"/site/data/data.jsonl", "/site/state/site.key", "/site/state/ledger.db"}
    assert twin <= of_vault, of_vault
    said = machine.podman("logs", vault)
    assert "NOT CONFINED" not in said and "OPEN" not in said, said
    (confined,) = {line for line in said.splitlines() if "without a network" in line}
    return f"a courier finds no record, ledger or key, the vault {len(of_vault)}; {confined}"


def _confined(machine: Machine, service: str, key: str, places: Sequence[str]) -> None:
    """Try in one container what must not work there."""
    name = container(machine, service)
    status = machine.podman("exec", name, "cat", "/proc/1/status")
    found = dict(re.findall(r"^(\w+):\t(\S+)", status, re.MULTILINE))
    assert {key: found[key] for key in CONFINED} == CONFINED, (service, found)
    refused = machine.podman("exec", name, "touch", "/opt/fedtune/x", fails=True)
    assert "Read-only file system" in refused, refused
    machine.podman("healthcheck", "run", name)
    write = f"open({key!r}, 'ab')"
    refused = machine.podman("exec", name, "python", "-c", write, fails=True)
    assert "Read-only file system" in refused or "Permission denied" in refused, refused
    for place in places:
        assert knock(machine, name, place, 443) != "reached", f"{service} reached {place}"


def charged(machine: Machine) -> str:
    """Every round of every site is in its ledger."""
    counts = {name: Counter(each.round for each in charges(machine, name)) for name in SITES}
    for name, paid in counts.items():
        assert set(paid) == set(range(1, ROUNDS + 1)), (name, paid)
    told = ", ".join(str(paid.total()) for paid in counts.values())
    return f"each of {ROUNDS} rounds is charged at each site: {told} charges"


def charges(machine: Machine, name: str) -> list[Charge]:
    """What a site's ledger holds of the newest study."""
    copy = machine.folder / "ledger"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(machine.tree / "deploy" / name / "state", copy)
    every = [spent.charge for spent in Ledger(copy).spending("records")]
    return [charge for charge in every if charge.study == every[-1].study]


@contextmanager
def paused(machine: Machine, service: str) -> Iterator[None]:
    """Hold a container still."""
    machine.podman("pause", container(machine, service))
    try:
        yield
    finally:
        machine.podman("unpause", container(machine, service))


def killed(machine: Machine) -> Iterator[str]:
    """SIGKILL to the first process of a container: its restart policy brings it back."""
    for service in ("north", "north-courier", "coordinator"):
        yield f"{service} was killed after round {_killed(machine, service)}, and went on"


def _killed(machine: Machine, service: str) -> int:
    at, begun = rounds(machine), state(machine, service)["StartedAt"]
    os.kill(state(machine, service)["Pid"], signal.SIGKILL)

    def again() -> bool:
        now = state(machine, service)
        return bool(now["Running"] and now["StartedAt"] != begun)

    until(again, 120, machine)
    until(lambda: rounds(machine) > at or not running(machine, "coordinator"), 900, machine)
    return at


def upgraded(machine: Machine) -> Iterator[str]:
    """The next release's images, in the middle of the study."""
    at = rounds(machine)
    assert at < ROUNDS, "the study was over before the upgrade"
    with paused(machine, "coordinator"):
        here = fedtune.__version__
        for file in ("fedtune/__init__.py", "pyproject.toml"):
            path = machine.tree / file
            path.write_text(path.read_text().replace(f'"{here}"', f'"{NEXT}"', 1))
        for image, dockerfile in IMAGES.items():
            machine.build(image, dockerfile, what=f"build {image}, next release")
    machine.timed("compose up, next release", "podman-compose", "up", "-d", "--no-build",
                  "--force-recreate")  # fmt: skip
    for service in ("coordinator", "north", "north-courier"):
        said = machine.podman("exec", container(machine, service), "fedtune", "--version")
        assert said.strip() == f"fedtune {NEXT}", said
    yield f"all went on from the images of release {NEXT} after round {at}"


# ------------------------------------------------------------------------------------ watching


@contextmanager
def outside() -> Iterator[None]:
    """A cable of our own, at whose far end nobody answers."""
    _ip("link", "del", LINK, fails=True)
    _ip("link", "add", LINK, "type", "veth", "peer", "name", FAR)
    try:
        _ip("addr", "add", "10.253.0.1/24", "dev", LINK)
        for end in (LINK, FAR):
            _ip("link", "set", end, "up")
        yield
    finally:
        _ip("link", "del", LINK)


@contextmanager
def watched(machine: Machine) -> Iterator[Callable[[], dict[str, int]]]:
    """Count packets that go from a site's network to any other interface of this machine, and
    look-ups of ASKED that the networks' name server passes on."""
    bridges = [machine.inspect("network", f"fedtune_{name}")["network_interface"] for name in SITES]
    with _counted(bridges) as count:
        yield count


@contextmanager
def _counted(bridges: list[str]) -> Iterator[Callable[[], dict[str, int]]]:
    name = bytes([len(LABEL)]) + LABEL.encode()
    lines = [f"table inet {TABLE} {{"]
    lines += ["chain forwarded {", "type filter hook forward priority -300;"]
    lines += [f'iifname "{bridge}" oifname != "{bridge}" counter' for bridge in bridges]
    # Where a query's first name stands: behind 8 bytes of UDP and 12 of DNS.
    lines += ["}", "chain looked_up {", "type filter hook output priority -300;"]
    lines += [f"udp dport 53 @th,160,128 0x{name.hex()} counter", "}", "}", ""]
    subprocess.run(["nft", "-f", "-"], input="\n".join(lines), text=True, check=True)

    def count() -> dict[str, int]:
        words = ["nft", "--json", "list", "table", "inet", TABLE]
        told = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
        found = dict(NONE_LEFT)
        for rule in (item["rule"] for item in told["nftables"] if "rule" in item):
            packets = (e["counter"]["packets"] for e in rule["expr"] if "counter" in e)
            found[rule["chain"]] += sum(packets)
        return found

    try:
        yield count
    finally:
        subprocess.run(["nft", "delete", "table", "inet", TABLE], check=True)


def twin_of_the_watch(machine: Machine) -> str:
    """The same knocks from a network that is not internal: they are counted."""
    machine.podman("network", "create", "fedtune-open")
    try:
        bridge = machine.inspect("network", "fedtune-open")["network_interface"]
        with _counted([bridge]) as count:
            words = ("run", "--rm", "--network", "fedtune-open", "--entrypoint", "python")
            for place in (OUTSIDE, ASKED):
                machine.podman(*words, "fedtune-site", "-c", KNOCK, place, "443")
            found = count()
            assert all(found.values()), f"the watch sees nothing: {found}"
            return (
                f"the twin, a network that is not internal: {found['forwarded']} packets and "
                f"{found['looked_up']} look-ups were counted"
            )
    finally:
        machine.podman("network", "rm", "--force", "fedtune-open")


def _ip(*words: str, fails: bool = False) -> None:
    subprocess.run(["ip", *words], check=not fails, capture_output=True)


# ---------------------------------------------------------------------------------- containers


@contextmanager
def cleared(machine: Machine) -> Iterator[None]:
    """Nothing of an earlier run before, nothing of this one after."""
    _clear(machine)
    try:
        yield
    finally:
        _clear(machine)


def _clear(machine: Machine) -> None:
    machine.podman("rm", "--force", "--all", "--time", "0")  # a paused one cannot be stopped
    with suppress(AssertionError):
        machine.compose("down")


def container(machine: Machine, service: str) -> str:
    label = f"label=com.docker.compose.service={service}"
    names = machine.podman("ps", "--all", "--filter", label, "--format", "{{.Names}}").split()
    assert len(names) == 1, (service, names)
    return names[0]


def state(machine: Machine, service: str) -> dict[str, Any]:
    found: dict[str, Any] = machine.inspect("container", container(machine, service))["State"]
    return found


def running(machine: Machine, service: str) -> bool:
    return bool(state(machine, service)["Running"])


def address(machine: Machine, service: str) -> str:
    found = machine.inspect("container", container(machine, service))
    return str(next(iter(found["NetworkSettings"]["Networks"].values()))["IPAddress"])


def knock(machine: Machine, name: str, host: str, port: int) -> str:
    return machine.podman("exec", name, "python", "-c", KNOCK, host, port).strip()


def rounds(machine: Machine) -> int:
    path = machine.tree / "deploy/runs/study/metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def until(true: Callable[[], Any], seconds: float, machine: Machine) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            logs = [machine.podman("logs", "--tail", "15", container(machine, s))
                    for s in ("coordinator", *SITES, *COURIERS)]  # fmt: skip
            raise AssertionError("it did not happen in time\n" + "\n---\n".join(logs))
        time.sleep(0.5)
