"""`fedtune doctor` as it is typed."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from fedtune.cli import doctor as cli_doctor
from fedtune.core import progress
from fedtune.core.config import load_study
from fedtune.core.models.build import build
from fedtune.core.training import selftest
from fedtune.doctor import machine
from tests.doctor_kit import Hub
from tests.test_cli import run


def test_the_command_knows_the_side_by_the_file(hub: Hub) -> None:
    hub.patch.chdir(hub.root)
    hub.patch.setenv("COLUMNS", "200")
    seen = run("doctor", "study.toml", "--port", str(hub.port))
    assert seen.exit_code == 0, seen.output
    assert "ok   port: 127.0.0.1" in seen.output and "BAD" not in seen.output
    seen = run("doctor", "study.toml", "--port", str(hub.port), "--name", "other.example.org")
    assert (
        seen.exit_code == 2
        and "BAD  names" in seen.output
        and "fedtune: 1 check failed" in seen.stderr
    )
    seen = run("doctor", hub.site)
    assert seen.exit_code == 2 and "BAD  records" in seen.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("study.toml", "--study", "study.toml"), "--study is for a site"),
        (("a/site.toml", "--home", "x"), "--home is for the coordinator"),
        (("a/site.toml", "--port", "1"), "--port is for the coordinator"),
        (("none.toml",), "no such file"),
        (("other.toml",), "neither a site.toml nor a study.toml"),
        (("coordinator/ca.pem",), "not valid TOML"),
    ],
)
def test_what_the_command_cannot_do_is_said(hub: Hub, words: tuple[str, ...], says: str) -> None:
    hub.patch.chdir(hub.root)
    (hub.root / "other.toml").write_text("[tool]\n")
    seen = run("doctor", *words)
    assert seen.exit_code == 2 and says in seen.stderr, seen.output


def test_memory_in_a_container_is_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    whole = machine.read_available_memory()
    if whole is None:
        pytest.skip(f"{sys.platform} does not say how much memory is free")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    assert machine.read_available_memory() == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.read_available_memory() == pytest.approx(whole, rel=0.2)


def test_what_base_and_adapter_take_is_counted_from_the_files(hub: Hub, tiny_base: Path) -> None:
    study = load_study(hub.study)
    network = build(study)
    plain = sum(p.numel() for n, p in network.model.named_parameters() if "lora_" not in n)
    lora = sum(p.numel() for n, p in network.model.named_parameters() if "lora_" in n)
    found = machine.need(study, machine.base(study))
    assert found.base == 4 * plain
    layers = network.model.config.num_hidden_layers
    assert study.lora and found.adapter * study.lora.last_layers == 4 * lora * layers


def test_a_check_that_takes_long_is_named_while_it_runs(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipe: the line comes before the finding, and a quick check has none."""
    hub.patch.chdir(hub.root)
    shown: list[float] = []

    def slow(*_: object) -> str:
        deadline = time.monotonic() + 20
        while "checking: records" not in said.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        shown.append(deadline - time.monotonic())
        return "counted"

    said = io.StringIO()
    console = Console(file=said, width=200)
    monkeypatch.setattr(cli_doctor, "Console", lambda: console)
    monkeypatch.setattr(cli_doctor, "SLOW_SECONDS", 0.5)
    monkeypatch.setattr("fedtune.officer.doctor._records", slow)
    monkeypatch.setattr(machine, "versions", lambda: "these")
    run("doctor", hub.site)
    lines = said.getvalue().splitlines()
    assert lines[0] == f"checking {hub.site}" and shown[0] > 0
    assert lines.index("     checking: records …") + 1 == lines.index("ok   records: counted")
    assert "     checking: versions …" not in lines


def test_the_self_test_says_which_oracle_runs(hub: Hub) -> None:
    heard: list[progress.Step] = []
    study = load_study(hub.study)
    with progress.listening(heard.append):
        results = selftest.run(study, build(study))
    names = [f"self-test: {result.name}" for result in results]
    named = [step for step in heard if step.text in names]
    assert named == [progress.Step(name, number, 4) for number, name in enumerate(names)]
