"""A private study of two rounds by compose, to its end and undisturbed: each round is charged once.

    north   its halves share a folder and no socket, as deploy/spool.yml says
    south   as docker-compose.yml has it
    west    its containers are refused what Docker's own list of system calls refuses and podman's
            does not: namespaces and mounts

A courier writes on no disk. What each half says of how it is confined is held against what Linux
says of its process, and `fedtune status`, `fedtune doctor` and docs/containers.md against that."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedtune.courier.process import ELSEWHERE
from tests.containers import consortium
from tests.containers.machine import ROOT, Machine
from tests.containers.walls import SEEN, disks, process_of, see

ROUNDS, SPOOLED = 2, "north"
PROFILE = Path("/usr/share/containers/seccomp.json")  # podman's own
# Docker's refuses them to whoever lacks CAP_SYS_ADMIN (moby, profiles/seccomp/default.json).
OF_DOCKER = ("unshare", "setns", "mount", "umount", "umount2", "mount_setattr", "move_mount",
             "open_tree", "fsopen", "fsconfig", "fsmount", "fspick")  # fmt: skip
REFUSED = {
    "vault": ["seccomp", "no network namespace: unshare: EPERM"],
    "courier": ["seccomp", ELSEWHERE, "no view of its own: unshare: EPERM"],
}
# On which disks a service may write. By a spool a courier's first process keeps its certificate.
WRITES = {"vault": {"/site/state", "/run/fedtune"}, "courier": set[str]()}
KEPT = {"/site/state/keys/renewed"}
LEFT = "import pathlib; print([str(each) for each in pathlib.Path('/spool').glob('*/*')])"
LOOK_UP = """
import socket
try:
    print(socket.getaddrinfo("coordinator", 8443))
except socket.gaierror as error:
    print("no name:", error.errno)
"""


def checks(machine: Machine) -> Iterator[str]:
    """A line for each check that held. Errors: AssertionError."""
    consortium.write_study(machine, ROUNDS, private=True)
    files = ("-f", "docker-compose.yml", "-f", "deploy/spool.yml", "-f", refusing(machine))
    machine.timed("compose up, two rounds", "podman-compose", *files, "up", "-d", "--no-build")
    consortium.until(lambda: not consortium.running(machine, "coordinator"), 1200, machine)
    code = consortium.state(machine, "coordinator")["ExitCode"]
    assert code == 0, f"the coordinator ended with {code}"
    assert consortium.rounds(machine) == ROUNDS
    yield charged_once(machine)
    yield spooled(machine)
    for site in consortium.SITES:
        yield as_told(machine, site)
    machine.compose(*files, "down", "--timeout", "20")
    shutil.move(machine.tree / "deploy/runs/study", machine.folder / "undisturbed")


def refusing(machine: Machine) -> Path:
    """West's containers under podman's list of system calls without what Docker's leaves out."""
    profile = json.loads(PROFILE.read_text())
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name not in OF_DOCKER]
    profile["syscalls"] = [rule for rule in profile["syscalls"] if rule["names"]]
    refuse = {"names": OF_DOCKER, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    profile["syscalls"].append(refuse)
    (file := machine.folder / "refusing.json").write_text(json.dumps(profile))
    option = {"security_opt": [f"seccomp={file}"]}
    services = {"services": {"west": option, "west-courier": option}}
    (compose := machine.folder / "refusing.yml").write_text(json.dumps(services))  # YAML, too
    return compose


def charged_once(machine: Machine) -> str:
    """As many charges as rounds at each site, each with noise."""
    for name in consortium.SITES:
        paid = consortium.charges(machine, name)
        assert Counter(each.round for each in paid) == dict.fromkeys(range(1, ROUNDS + 1), 1), paid
        assert all(each.noise_multiplier > 0 for each in paid), paid
    return f"a private study of {ROUNDS} rounds to its end: {ROUNDS} charges at each site"


def spooled(machine: Machine) -> str:
    """North's vault has no route and no name, its courier no record, ledger or key; nothing is left
    in the folder between them."""
    vault, courier = (consortium.container(machine, name) for name in ("north", "north-courier"))
    for name, words in ((vault, "vault"), (courier, "courier")):
        command = machine.inspect("container", name)["Config"]["Cmd"]
        assert command == [words, "/site/site.toml", "--spool", "/spool"], command
    inside = ("exec", vault, "python", "-c")
    assert machine.podman(*inside, consortium.ROUTES).strip() == "['lo'] 0"
    assert machine.podman(*inside, LOOK_UP).startswith("no name")
    consortium.until(lambda: machine.podman(*inside, LEFT).strip() == "[]", 30, machine)
    return f"by a folder alone: {consortium.found(machine, vault, courier)}"


def as_told(machine: Machine, site: str) -> str:
    """What a site's halves say of their confinement is so, and is what a person there is told."""
    told = confined(machine, site)
    page = " ".join((ROOT / "docs/containers.md").read_text().split()).lower()
    for half, walls in told.items():
        service = site if half == "vault" else f"{site}-courier"
        first = int(consortium.state(machine, service)["Pid"])
        inside, around = see(process_of(half, first)), see(first)
        writes = KEPT if service == f"{SPOOLED}-courier" else WRITES[half]
        assert disks(first) == writes, (service, disks(first))
        seen = inside.walls(half, around)
        assert seen == SEEN & set(walls), (site, half, seen, walls)
        assert "seccomp" in seen and inside.programs == around.programs + 1, (inside, around)
        assert around.walls(half, around) == set()  # the twin: who started it is not confined so
        words = ", ".join(walls).lower()
        assert re.sub(r"landlock \d+", "landlock", words) in re.sub(
            r"landlock \d+", "landlock", page
        )
        if site == "west":
            without = [wall for wall in walls if not wall.startswith("landlock")]
            assert without == REFUSED[half], walls
        else:
            assert not [wall for wall in walls if wall.startswith("no ")], walls
    screens = [(site, "status", "--once", "/site/site.toml"), (site, "doctor", "/site/site.toml")]
    if site == SPOOLED:
        screens.append((f"{site}-courier", "status", "--once", "/site/state/flower"))
    for service, *command in screens:
        name = consortium.container(machine, service)
        words = ("exec", "--env", "COLUMNS=1000", name, "fedtune", *command)
        said = machine.podman(*words, fails=None)  # doctor reaches no coordinator from a vault
        halves = told if site != SPOOLED else ["vault" if service == site else "courier"]
        for half in halves:
            assert f"{half}: {', '.join(told[half])}" in said, (words, told, said)
        assert "OPEN" not in said and ("isolation" in said or command[0] == "status"), said
    shown = "; ".join(f"{half}: {', '.join(walls)}" for half, walls in told.items())
    return f"{site} is confined as it says, and status and doctor say so: {shown}"


def confined(machine: Machine, site: str) -> dict[str, list[str]]:
    """How a site's halves say that they are confined: to one screen, or by a spool to one each."""
    places = {site: "/site/state"}
    if site == SPOOLED:
        places[f"{site}-courier"] = "/site/state/flower"
    told: dict[str, list[str]] = {}
    for service, folder in places.items():
        name = consortium.container(machine, service)
        found = json.loads(machine.podman("exec", name, "cat", f"{folder}/status.json"))
        assert found["open"] == 0, found
        told |= found["confined"]
    assert set(told) == {"vault", "courier"}, told
    return told
