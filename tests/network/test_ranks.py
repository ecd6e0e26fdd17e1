"""Sites of different ranks, as processes over TLS, make the adapter that one process makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtune.flower.ports import free_port
from tests.network.kit import OFF, SITES, Consortium, consortium, until
from tests.simulated import simulate

RANKS = {"east": 2, "north": 3, "south": 4}


def set_ranks(made: Consortium, base: Path) -> None:
    made.lay_out(base, OFF, rounds=2)
    plan = made.hub / "study.toml"
    plan.write_text(plan.read_text().replace("rank = 4", "rank = 4\nmin_rank = 2"))
    for name, rank in RANKS.items():
        site = made.root / name / "site.toml"
        site.write_text(site.read_text().replace("[data]", f"lora_rank = {rank}\n[data]"))


def simulated(made: Consortium, folder: Path, ranks: bool) -> dict[str, np.ndarray]:
    """The adapter of the same study in one process; ranks: as the sites set them, or whole."""
    sites = []
    for name in SITES:
        shutil.copytree(made.root / name, folder / name, ignore=shutil.ignore_patterns("state"))
        site = folder / name / "site.toml"
        text = site.read_text().split("[coordinator]")[0]
        site.write_text(text if ranks else text.replace(f"lora_rank = {RANKS[name]}\n", ""))
        sites.append(site)
    simulate(made.hub / "study.toml", sites, folder / "run")
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


@pytest.mark.long  # by default: one rank over TLS (tests/test_end_to_end.py), many in one process
def test_sites_of_other_ranks_over_tls_equal_one_process(tmp_path: Path, tiny_base: Path) -> None:
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        set_ranks(made, tiny_base)
        server = made.server()
        until(made.listens, 60, made.told)
        for name in SITES:
            made.join(name)
        clients = [made.client(name, "--once") for name in SITES]
        assert server.wait(120) == 0, made.told()
        assert [client.wait(60) for client in clients] == [0, 0, 0], made.told()
        assert made.report()["lora_ranks"]["sites"] == RANKS
        found = load_file(made.run / "adapter" / "adapter_model.safetensors")
        same, whole = (simulated(made, tmp_path / str(ranks), ranks) for ranks in (True, False))
        for name, array in found.items():
            np.testing.assert_allclose(array, same[name], rtol=0, atol=1e-6)
        assert any(np.abs(array - whole[name]).max() > 1e-3 for name, array in found.items())
