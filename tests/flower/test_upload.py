"""An upload that is cut in the middle goes on where it was: real processes, and a proxy that cuts.

Flower moves an array as parts of at most 5 MiB, each under its digest, two at a time; a SuperNode
sends a part again until it is told that it arrived. So a cut costs the parts under way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.retry import make_simple_http_retry_invoker

from fedtune.core.processes import is_reachable
from fedtune.core.wire.arrays import unpack_arrays
from fedtune.flower import api
from fedtune.flower.ports import free_port
from fedtune.launch import coordinator
from tests.flower import kit, tls_roles, upload_roles
from tests.flower.test_tls import STUDY, until
from tests.flower.upload_roles import PART, SIZE

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def role(log: Path, *words: object) -> Iterator[None]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(upload_roles.__file__)), *map(str, words)]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def upload(root: Path, at: list[int]) -> tuple[np.ndarray, list[int], int]:
    """One answer of one site through the proxy: what arrived, and the bytes from the site at each
    cut and in the end."""
    port, proxy, found = free_port(), free_port(), dict[str, Any]()
    (root / "study.toml").write_text(STUDY)
    file = kit.site_file(root / "site", "a", port, f'proxy = "http://127.0.0.1:{proxy}"\n')
    kit.join_up(root / "home", file, port)

    def rounds(grid: Any, *_: Any, **__: Any) -> dict[str, Any]:
        until(lambda: bool(list(grid.get_node_ids())), 60)
        ((_, reply),) = tls_roles.ask(grid, "train", {"round": ConfigRecord({"round": 1})})
        assert not reply.has_error(), reply.error
        found["array"] = unpack_arrays(reply.content.array_records["update"])["a"]
        return {}

    with role(root / "proxy.log", "proxy", proxy, *at):
        until(lambda: is_reachable("127.0.0.1", proxy))
        with role(root / "site.log", "site", file):
            coordinator.serve(root / "study.toml", root, port=port, home=root / "home", run=rounds)
    *cuts, whole = (int(line.split()[1]) for line in (root / "proxy.log").read_text().splitlines())
    return found["array"], cuts, whole


CUTS = {"none": [], "one": [3 * PART + PART // 2], "three": [2 * PART, 5 * PART, 9 * PART]}


@pytest.mark.long  # by default: one part, below
@pytest.mark.parametrize("name", CUTS)
def test_an_upload_goes_on_where_it_was_cut(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    array, cuts, whole = upload(tmp_path, CUTS[name])
    np.testing.assert_array_equal(array, upload_roles.update())
    assert len(cuts) == len(CUTS[name])
    with capsys.disabled():
        print(f"\n[{name}: {whole:,} bytes for {SIZE:,}; {whole - SIZE:,} more; cuts at {cuts}]")
    assert whole - SIZE <= len(cuts) * 2 * PART + SIZE // 50
    if cuts:  # the twin: who begins again after the last cut sends all of it once more
        assert whole < cuts[-1] + SIZE


# ---------------------------------------------------------------------------------- one part alone


class SuperLink:
    """Flower's answers to a part: stored when it was waited for, else not. script: what breaks."""

    def __init__(self, *script: str) -> None:
        self.script, self.waiting, self.bytes = list(script), {"part"}, 0

    def push(self, _client: Any, request: PushObjectRequest) -> PushObjectResponse:
        how = self.script.pop(0) if self.script else "arrives"
        self.bytes += len(request.object_content)
        if how == "breaks on the way":
            raise httpx.WriteError("[SSL: BAD_LENGTH] _ssl.c:2406")
        stored = request.object_id in self.waiting
        self.waiting.discard(request.object_id)
        if how == "its answer is lost":
            raise httpx.ReadError("EOF occurred in violation of protocol (_ssl.c:2406)")
        return PushObjectResponse(stored=stored)


def sent(push: Any) -> bool:
    """Push one part as Flower's SuperNode does, until there is an answer."""
    invoker = make_simple_http_retry_invoker()
    invoker.wait_function = lambda _: None
    request = PushObjectRequest(session_id="s", object_id="part", object_content=b"1234")
    return bool(invoker.invoke(push, None, request).stored)


FAULTS = (["breaks on the way"], ["its answer is lost"], ["its answer is lost"] * 3)


@pytest.mark.parametrize("script", [[], *FAULTS], ids=str)
def test_a_part_is_sent_until_it_has_arrived(script: list[str]) -> None:
    there = SuperLink(*script)
    assert sent(api.make_resumable(there.push)) and not there.waiting
    assert there.bytes == 4 * (1 + len(script))


@pytest.mark.parametrize("script", FAULTS, ids=str)
def test_flowers_own_gives_the_message_up(script: list[str]) -> None:
    """The twin, and the reason why `make_resumable` is there."""
    try:
        arrived = sent(SuperLink(*script).push)
    except httpx.TransportError:
        arrived = False
    assert not arrived


def test_a_part_that_nobody_waits_for_is_refused_at_once() -> None:
    there = SuperLink()
    there.waiting.clear()
    assert not sent(api.make_resumable(there.push))
