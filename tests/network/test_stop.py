"""Signs of life of a server and a client whose output is a file, and Ctrl-C at each: as
documented, a stop that a person asked for and no error."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from fedtune.core.processes import is_reachable
from fedtune.flower.ports import free_port
from tests.network.kit import OFF, Consortium, consortium, done, until


@pytest.mark.long  # by default: a coordinator that is stopped (tests/flower/test_tls.py)
def test_ctrl_c_ends_the_server_with_130_and_is_no_error(tmp_path: Path, tiny_base: Path) -> None:
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, OFF, rounds=2)
        server = made.server()
        until(lambda: is_reachable("127.0.0.1", made.port), 90, made.told)
        until(lambda: "waiting      for sites" in made.log("hub").read_text(), 60, made.told)
        told = made.log("hub").read_text()
        assert f"at 127.0.0.1:{made.port}\n" in told and "admitted     nobody yet" in told
        made.join("north")
        assert f"consortium   {made.fingerprint}\n" in told
        shown = done(made.hub, "status", "coordinator")
        # "ready" once the plan is made, whoever has come by then.
        assert (
            "waiting" in shown or "ready" in shown
        ) and f"consortium {made.fingerprint}" in shown
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130, made.told()
        said = made.log("hub").read_text()
        assert "fedtune: stopped before the first round: no site has paid anything" in said
        assert "DEBUG" not in said and "Error" not in said
        status = json.loads((made.hub / "coordinator" / "status.json").read_text())
        assert status["state"] == "stopped" and "error" not in status
        assert "stopped (Ctrl-C)" in done(made.hub, "status", "coordinator")
        stopped_client(made)


def stopped_client(made: Consortium) -> None:
    """A client whose coordinator is not there says so in its log; Ctrl-C ends it."""
    client, words = made.client("north"), f"connecting to the coordinator at 127.0.0.1:{made.port}"
    until(lambda: words in made.log("north").read_text(), 60, made.told)
    assert f"coordinator at 127.0.0.1:{made.port}" in done(made.root, "status", "north/site.toml")
    client.send_signal(signal.SIGINT)
    assert client.wait(30) == 130, made.told()
    assert "stopped (Ctrl-C)" in done(made.root, "status", "north/site.toml")
    assert "fedtune: stopped\n" in made.log("north").read_text()
