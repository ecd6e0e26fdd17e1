"""Slurm on one node, for a test: its daemons as root, by loopback alone, in a folder of the test's.

Skipped where it is not installed (Debian: slurm-wlm), or the test may not run it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fedtune.flower.ports import free_port

NEEDED = ("munged", "mungekey", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
CommunicationParameters=NoInAddrAny
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname={host} CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run the daemons; yields the environment in which its commands find them."""
    found = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    missing = [name for name in NEEDED if not shutil.which(name, path=found["PATH"])]
    if missing or os.geteuid():
        pytest.skip(f"slurm-wlm is not installed ({', '.join(missing)}), or this is not root")
    for each in ("munge", "state", "spool"):
        (folder / each).mkdir(parents=True, mode=0o700)
    names = {"folder": folder, "ctld": free_port(), "slurmd": free_port()}
    names |= {"host": socket.gethostname().partition(".")[0], "cpus": os.cpu_count() or 1}
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format_map(names))
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    found["SLURM_CONF"] = str(configuration)
    munge = folder / "munge"
    key = munge / "key"
    subprocess.run(["mungekey", "--create", f"--keyfile={key}"], env=found, check=True)
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--log-file={munge}/log"]
    munged += [f"--seed-file={munge}/seed", "--num-threads=1"]
    with ExitStack() as running:
        for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "localhost"]):
            running.enter_context(_daemon(command, found, folder / f"{command[0]}.out"))
        deadline = time.monotonic() + 60
        while "IDLE" not in _nodes(found):
            if time.monotonic() > deadline:
                logs = sorted(folder.rglob("*.log")) + sorted(folder.glob("*.out"))
                told = "\n".join(log.read_text(errors="replace")[-1500:] for log in logs)
                pytest.fail(f"slurm does not come up: {_nodes(found)}\n{told}")
            time.sleep(0.5)
        yield found


def _nodes(environment: dict[str, str]) -> str:
    command = ["scontrol", "--oneliner", "show", "node"]
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


@contextmanager
def _daemon(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
