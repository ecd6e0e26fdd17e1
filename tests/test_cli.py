"""The command line: exit codes, one line per error, and a study from `init` to `generate`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune import __version__
from fedtune.core.errors import (
    BudgetExceeded,
    ConfigError,
    DataError,
    FedtuneError,
    InfrastructureError,
    PolicyRefused,
)
from fedtune.launch import simulate
from fedtune.runs.choice import folder_for
from tests.cli_kit import run


def test_help_is_quick_and_every_command_has_one() -> None:
    imported = subprocess.run(
        [sys.executable, "-c", "import sys, fedtune.cli.main as c; print(*sys.modules)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert not {"torch", "transformers", "flwr", "matplotlib", "pydantic"} & set(imported)
    top, more = run("--help"), run("more")
    assert top.exit_code == more.exit_code == 0 and "fedtune more" in top.output
    names = ("demo", "init", "plan", "simulate", "server", "client", "evaluate", "generate")
    names += ("enroll", "admit", "revoke", "status")
    names += ("review", "ledger", "withdraw", "doctor", "audit")
    for name in names:
        assert name in more.output
        assert run(name, "--help").exit_code == 0
    for words in (("models", "list"), ("models", "fetch"), ("models", "verify")):
        assert run(*words, "--help").exit_code == 0
    assert "The public plan" in run("simulate", "--help").output
    assert run("--version").output == f"fedtune {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a", "b", "c"), 2),
        (DataError("a"), 2),
        (PolicyRefused("a"), 3),
        (BudgetExceeded("a"), 3),
        (InfrastructureError("a"), 4),
        (FedtuneError("a\nb"), 4),
    ],
)
def test_an_error_is_one_line_and_its_own_code(
    study: Path, monkeypatch: pytest.MonkeyPatch, error: FedtuneError, code: int
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(simulate, "simulate", fails)
    found = run("simulate", study)
    assert found.exit_code == code
    assert found.stderr == f"fedtune: {' '.join(str(error).split())}\n"


def test_a_fault_of_the_program_shows_no_content(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("patient Smith has a cough")

    monkeypatch.setattr(simulate, "simulate", fails)
    found = run("simulate", study)
    assert found.exit_code == 4 and "Smith" not in found.output + found.stderr
    assert found.stderr.startswith("fedtune: internal error (ValueError); to do: set FEDTUNE_DEBUG")
    assert found.stderr.count("\n") == 1
    monkeypatch.setenv("FEDTUNE_DEBUG", "1")
    assert "Traceback" in run("simulate", study).stderr


def test_ctrl_c_says_how_to_go_on(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "simulate", stopped)
    found = run("simulate", study)
    assert found.exit_code == 130
    assert found.stderr.startswith("fedtune: stopped before the first round: no site has paid")
    (Path("runs/tiny") / "checkpoint").mkdir(parents=True)
    (Path("runs/tiny") / "checkpoint" / "run.db").touch()
    resumed = run("simulate", study, "--resume")
    assert resumed.exit_code == 130 and "--resume goes on" in resumed.stderr
    assert run("plan", study).exit_code == 0  # of a command that has nothing to resume


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("simulate", "nowhere.toml"), "nowhere.toml: no such file"),
        (("simulate", "{study}", "--sites", "nowhere"), "nowhere"),
        (("plan", "nowhere.toml"), "nowhere.toml: no such file"),
        (("evaluate", "nowhere", "--data", "e.jsonl"), "nowhere: not a run folder"),
        (("generate", "nowhere", "--prompt", "a"), "nowhere: not a run folder"),
        (("client", "nowhere.toml"), "nowhere.toml: no such file"),
        (("server", "nowhere.toml"), "nowhere.toml: no such file"),
        (("models", "verify", "pypi:nothing"), "not a wheel that fedtune knows"),
    ],
)
def test_a_wrong_argument_is_exit_code_2(
    study: Path, arguments: tuple[str, ...], says: str
) -> None:
    found = run(*(a.format(study=study) for a in arguments))
    assert found.exit_code == 2, found.output + found.stderr
    assert says in found.stderr and found.stderr.count("\n") == 1


def test_usage_errors_are_exit_code_2() -> None:
    for arguments in (("simulate",), ("nonsense",), ("simulate", "a", "--engine", "magic")):
        assert run(*arguments).exit_code == 2


def test_init_writes_a_study_once(tmp_path: Path) -> None:
    found = run("init", tmp_path / "new")
    assert found.exit_code == 0 and "study.toml" in found.output
    again = run("init", tmp_path / "new")
    assert again.exit_code == 2 and "exists" in again.stderr


def test_plan_shows_what_follows(study: Path) -> None:
    found = run("plan", study, "--size", 100)
    assert found.exit_code == 0 and "north" not in found.output
    assert "0.768" in found.output or "0.769" in found.output  # σ of 2 full steps at ε = 8
    assert "north" in run("plan", study).output
    study.write_text(study.read_text().replace("epsilon = 8", "noise_multiplier = 1.0"))
    assert "5." in run("plan", study, "--size", 100).output


def test_a_run_goes_into_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_for("a", resume=True) == folder_for("a", resume=False) == Path("runs/a")
    Path("runs/a").mkdir(parents=True)
    assert folder_for("a", resume=True) == Path("runs/a")
    assert folder_for("a", resume=False) == Path("runs/a-2")
    Path("runs/a-2").mkdir()
    assert folder_for("a", resume=True) == Path("runs/a-2")
