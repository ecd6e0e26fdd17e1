"""An answer of a hundred times the agreed size, through the real gateway and SuperLink: it is
dropped, nothing grows by it, and the honest site's answer is there in time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from fedtune.flower import allowance, enrol, replies
from fedtune.flower.ports import free_port
from fedtune.launch import coordinator
from fedtune.server.exchange import Reply, ask
from tests.flower import kit, upload_roles
from tests.flower.test_tls import STUDY, until

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
SITES = {"honest": (MIB,), "large": (100 * MIB,), "folded": (100 * MIB, "zeros")}


@contextmanager
def sites(root: Path, port: int) -> Iterator[None]:
    """Parts of 1 MiB: of the folded answer's hundred all are the same one, which travels once."""
    parts = {"FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(MIB)}
    environment = {**os.environ, **parts, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = []
    with ExitStack() as logs:
        for name, words in SITES.items():
            file = kit.site_file(root / name, name, port)
            kit.join_up(root / "home", file, port)
            sink = logs.enter_context((root / f"{name}.log").open("wb"))
            command = [sys.executable, upload_roles.__file__, "site", str(file), *map(str, words)]
            running.append(subprocess.Popen(command, stdout=sink, stderr=sink, env=environment))
        try:
            yield
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait(30)


def peak() -> int:
    """The most memory that this process had so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@pytest.mark.long  # by default: the gateway alone (tests/flower/test_gateway_asked.py)
def test_an_answer_of_a_hundred_times_the_agreed_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, found = free_port(), dict[str, Any]()
    home, most = tmp_path / "home", replies.WORDS + MIB
    (tmp_path / "study.toml").write_text(STUDY)

    def rounds(grid: Any, *_: Any, **__: Any) -> dict[str, Any]:
        until(lambda: len(list(grid.get_node_ids())) == len(SITES), 90)
        members = coordinator.Members(home)
        found["members"] = dict(who := members(grid))
        contents = dict.fromkeys(who, RecordDict({"round": ConfigRecord({"round": 1})}))
        members.expect(grid, contents, most)
        before, began = peak(), time.monotonic()
        for reply in ask(grid, "train", contents, "1", 60.0, most):
            found[who[reply.node].name] = reply
            found[f"seconds of {who[reply.node].name}"] = time.monotonic() - began
        found["grown"] = peak() - before
        return {}

    with sites(tmp_path, port):
        coordinator.serve(tmp_path / "study.toml", tmp_path, port=port, home=home, run=rounds)
    keys = {r.name: r.signing for r in enrol.registry(home).values()}
    assert dict(found["members"].values()) == keys
    honest, large, folded = (found[name] for name in SITES)
    assert honest.content is not None and honest.size > MIB
    assert folded == Reply(folded.node, None, folded.reason, status="dropped")
    assert "not as agreed" in folded.reason
    assert large.content is None and large.status == "dropped"
    stored = sum(file.stat().st_size for file in (home / "flower").glob("state.db*"))
    with capsys.disabled():
        print({k: v for k, v in found.items() if k[0] in "gs"}, f"{stored=}")
    assert found["grown"] < 16 * MIB
    assert stored < 2 * allowance.compute_limit(most)
