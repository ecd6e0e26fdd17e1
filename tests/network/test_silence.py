"""Connections that fall silent and stay open at either end, over IPv6."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.flower.ports import free_port
from tests.network import remains
from tests.network.kit import PRIVATE, SITES, consortium, end, until


@pytest.mark.long
def test_connections_that_fall_silent_cost_no_update_and_no_second_charge(
    tmp_path: Path, tiny_base: Path
) -> None:
    """A firewall that forgets a connection tells neither end. Two sites of three behind one that
    forgets each after some seconds; the coordinator at ::1."""
    rounds = 3
    with consortium(tmp_path, "::1", free_port()) as made:
        made.lay_out(tiny_base, PRIVATE, rounds, round_timeout=60)
        server = made.server()
        until(made.listens, 600, made.told)
        for name in SITES:
            made.join(name)
            if name != "south":
                made.faults(name, free_port(), 10.0, "silent")
            made.client(name)
        assert server.wait(1800) == 0, made.told()
        forgot = [made.log(f"{name}-faults").read_text().count("silent") for name in SITES[:2]]
        assert min(forgot) > 0, "no connection fell silent"
        for process in made.running:
            end(process)
        remains.check(made, private=True)
        for name in SITES:
            spent = made.spending(name)
            assert [each.charge.round for each in spent] == list(range(1, rounds + 1)), name
            assert all(each.released for each in spent), name
