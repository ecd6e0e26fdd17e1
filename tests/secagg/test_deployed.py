"""The protocol between processes, over mutual TLS: the same adapter as in one process."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedtune
from fedtune.core.ledger.ledger import Ledger
from tests.secagg.world import NAMES, adapter_of, lay_out
from tests.test_cli import run
from tests.test_end_to_end import command

SITES = NAMES[:3]


def deploy(folder: Path, port: int, keys: dict[str, str]) -> None:
    """Give each site its coordinator, and its peers' keys."""
    for name in SITES:
        path = folder / f"{name}.toml"
        peers = ", ".join(f'"{key}"' for other, key in keys.items() if other != name)
        where = f'[coordinator]\naddress = "127.0.0.1:{port}"\nanswer = "{name}.answer"\n'
        path.write_text(f"{path.read_text()}peers = [{peers}]\n{where}")


@pytest.mark.long  # three clients and a server as processes: a minute of processor time
@pytest.mark.parametrize("killed", [False, True])
def test_tls_processes_open_the_sum_that_simulation_opens(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """σ = 0: to the last bit, since the integers are the same; also where a client is killed once
    it said ready, and started again. Its draw is gone unless its words were stored already: then
    the attempt is void, and everybody draws and pays anew."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study, sites = lay_out(tmp_path / "here", tiny_base)
    here = fedtune.simulate(study, sites, tmp_path / "here" / "run")
    lay_out(tmp_path / "there", tiny_base)
    folder, home, out = tmp_path / "there", tmp_path / "home", tmp_path / "there" / "run"
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    deploy(folder, port, {n: Ledger(folder / f"{n}-state").key.public for n in SITES})
    logs = tmp_path / "logs"
    logs.mkdir()
    with ExitStack() as running:
        at = ("--home", home, "--port", port)
        told = ("server", folder / "study.toml", "--out", out, *at)
        server = running.enter_context(command(logs / "server", *told))
        clients = {}
        for name in SITES:
            site, request = folder / f"{name}.toml", tmp_path / f"{name}.request"
            said = run("enroll", site, "--out", request).output
            heard = ("--fingerprint", said.partition("fingerprint   ")[2].splitlines()[0])
            place = ("--address", f"127.0.0.1:{port}", "--out", folder / f"{name}.answer")
            done = run("admit", request, "--home", home, *heard, *place)
            assert done.exit_code == 0, done.output
            client = command(logs / name, "client", site, "--once")
            clients[name] = running.enter_context(client)
        if killed:
            said, deadline = folder / "south-state" / "log.jsonl", time.monotonic() + 200
            while not (said.exists() and '"train.ready"' in said.read_text()):
                assert time.monotonic() < deadline and server.poll() is None
                time.sleep(0.01)
            os.kill(clients["south"].pid, signal.SIGKILL)
            again = command(logs / "south-2", "client", folder / "south.toml", "--once")
            running.enter_context(again)
        code = server.wait(300)
        assert code == 0, (logs / "server").read_text()[-2000:]
    one, two = adapter_of(here), load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(np.array_equal(one[name], two[name]) for name in one)
    for name in SITES:
        drawn = [charge.round for charge in Ledger(folder / f"{name}-state").charges("records")]
        assert drawn in ([[1, 2], [1, 1, 2], [1, 2, 2]] if killed else [[1, 2]])
