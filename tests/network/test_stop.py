"""Ctrl-C at `fedtune server`: as documented, a stop that a person asked for and no error."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from fedtune.flower.processes import free_port, reachable
from tests.network.kit import OFF, consortium, until


def test_ctrl_c_ends_the_server_with_130_and_is_no_error(tmp_path: Path, tiny_base: Path) -> None:
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, OFF, rounds=2)
        server = made.server()
        until(lambda: reachable("127.0.0.1", made.port), 90, made.told)
        until(lambda: (made.hub / "coordinator" / "status.json").exists(), 30, made.told)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130, made.told()
        said = made.log("hub").read_text()
        assert "fedtune: stopped; continue with --resume" in said
        assert "DEBUG" not in said and "Error" not in said
        status = json.loads((made.hub / "coordinator" / "status.json").read_text())
        assert status["state"] == "stopped" and "error" not in status
