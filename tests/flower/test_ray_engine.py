"""The Ray engine without a cluster: what it refuses, and what a node must see."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.launch import ray
from fedtune.launch.simulate import simulate
from tests.secagg.world import lay_out


def test_a_missing_ray_is_said_with_what_to_install(tmp_path, tiny_base, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else find(name)
    )
    study, sites = lay_out(tmp_path, tiny_base)
    with pytest.raises(InfrastructureError, match=r"pip install 'fedtune\[ray\]'"):
        simulate(study, sites, tmp_path / "run", engine="ray", processes=2)
    assert not (tmp_path / "run").exists()


def test_an_address_without_the_engine_is_refused(tmp_path, tiny_base):
    study, sites = lay_out(tmp_path, tiny_base)
    with pytest.raises(ConfigError, match="--address is for --engine ray"):
        simulate(study, sites, tmp_path / "run", address="auto")


@pytest.mark.parametrize("address", ["ray://head:10001", "head", ":6379", "head:", "head:http"])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        ray._check_address(address)


def test_an_address_where_nothing_listens_is_said_at_once():
    with pytest.raises(InfrastructureError, match=r"nothing answers at 127\.0\.0\.1:1"):
        ray._check_address("127.0.0.1:1")


def test_a_node_must_see_the_same_folders_and_respect_their_locks(tmp_path):
    """A lock that is held under another descriptor is as another process sees it."""
    site, state = tmp_path / "site.toml", tmp_path / "state"
    site.write_text("[site]")
    with ray._marked([site], [state, state]) as marks:
        assert [path.parent for path in map(Path, marks[1])] == [state]
        assert ray._differences(*marks) == ""
        site.write_text("[site] # of the node itself")
        assert ray._differences(*marks) == f"{site} is missing or another file"
        site.write_text("[site]")
        (state / "elsewhere").touch()  # a file system that locks within one node alone
        there = str(state / "elsewhere")
        assert ray._differences(marks[0], [there]) == f"locks in {state} do not hold"
        os.rename(state, tmp_path / "of the coordinator")
        assert ray._differences(*marks) == f"{state} is missing or another folder"
        os.rename(tmp_path / "of the coordinator", state)
    assert [path.name for path in state.iterdir()] == ["elsewhere"]
