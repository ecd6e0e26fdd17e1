"""What an earlier release left on disk is read, charged on top of and gone on with by this one.

Every test works on a copy. No set is ever made again: see make.py."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune import report
from fedtune.core.config import load_site
from fedtune.core.ledger.files import LedgerError
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.spending import budget
from fedtune.core.models.loaded import load
from fedtune.core.registry.rounding import rounded_up
from fedtune.report.run_files import read_report
from fedtune.server.store import CheckpointError
from tests.formats import read_back
from tests.test_cli import run

SETS = sorted(path for path in (Path(__file__).parent / "data").iterdir() if path.is_dir())


@pytest.fixture(params=SETS, ids=lambda path: path.name)
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one set, which is the working directory."""
    shutil.copytree(request.param, tmp_path / "world", symlinks=True)
    for name in read_back.SITES:  # version control keeps no file for its owner alone
        for secret in ("site.key", "salt"):
            (tmp_path / "world" / f"state-{name}" / secret).chmod(0o600)
    link = tmp_path / "world" / "daily" / "adapter"
    if not link.is_symlink():  # nor does a source archive keep a link
        link.symlink_to("versions/1", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path / "world"


def written(world: Path) -> Any:
    return json.loads((world / "expected.json").read_text())


def same(found: Any, wanted: Any, where: str = "") -> None:
    """Equal but for the last digits of a number that was computed again."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted), where
        for key in wanted:
            same(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for at, each in enumerate(wanted):
            same(found[at], each, f"{where}[{at}]")
    else:
        assert found == (pytest.approx(wanted) if isinstance(wanted, float) else wanted), where


@pytest.mark.parametrize("name", read_back.SITES)
def test_a_ledger_is_whole_and_says_what_was_spent(world: Path, name: str) -> None:
    same(read_back.site(world / f"site-{name}.toml"), written(world)["sites"][name])


def test_a_set_holds_what_a_change_of_format_could_lose(world: Path) -> None:
    """Or a set that lacks it would prove nothing."""
    north = written(world)["sites"]["north"]
    assert len({charge["study"] for charge in north["charges"]}) == len(north["steps"]) == 4
    assert [cohort["units"] for cohort in north["cohorts"]] == [0, 3]
    assert north["admitted"] and north["withdrawn"] == 1
    assert (world / "state-north" / "ledger.receipt").is_file()
    assert (world / "triage" / "adapter" / "head.safetensors").is_file()
    assert written(world)["checkpoint"]["phase"] == "kept"
    assert written(world)["checkpoint"]["state"] == "stopped"


def test_a_further_round_is_reserved_and_charged(world: Path) -> None:
    site = load_site(world / "site-north.toml")
    ledger, wanted = Ledger(site.site.state), written(world)["sites"]["north"]
    before = ledger.spending("records")
    asked: list[int] = []
    further = replace(before[-1].charge, round=2)
    number = ledger.reserve("records", further, "sha256:1", lambda all_: asked.append(len(all_)))
    ledger.release(number, b"update")
    again = Ledger(site.site.state)
    again.verify()
    after = again.spending("records")
    assert asked == [len(wanted["charges"])]
    assert after[:-1] == before and after[-1].charge == further and after[-1].released
    assert again.released(further.study, 2, "sha256:1") == b"update"
    assert budget("records", after, site.policy).epsilon > wanted["epsilon"]
    assert [len(cohort.spent) for cohort in again.cohorts("records")] == [
        cohort["charges"] + 1 for cohort in wanted["cohorts"]
    ]


def test_an_interrupted_run_goes_on_to_its_end(world: Path) -> None:
    kept = written(world)["checkpoint"]
    same(read_back.checkpoint(world / "broken", world / "broken.toml"), kept)
    sites = [word for name in read_back.SITES for word in ("--sites", f"site-{name}.toml")]
    done = run("simulate", "broken.toml", *sites, "--out", "broken", "--resume")
    assert done.exit_code == 0, done.output
    lines = (world / "broken" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]
    same([json.loads(lines[0])], kept["rounds"])
    assert read_report(world / "broken")["privacy"]["steps"] == 3
    for name in read_back.SITES:
        spent = Ledger(world / f"state-{name}").spending("records")
        rounds = Counter(one.charge.round for one in spent if one.charge.name == "broken")
        assert rounds == {1: 1, 2: 1, 3: 1}
    for file in ("report.json", "plan.json", "metrics.jsonl", "adapter/adapter_config.json"):
        earlier, now = (keys_of(world / run / file) for run in ("notes", "broken"))
        assert earlier and not earlier - now, file  # keys of a run's results are only added


def keys_of(path: Path) -> set[str]:
    """Every key of a run's JSON file, behind those above it."""

    def walk(value: Any, above: str) -> set[str]:
        inner = value.items() if isinstance(value, dict) else []
        below = [(each, above) for each in value] if isinstance(value, list) else []
        below += [(each, f"{above}.{key}") for key, each in inner]
        return {above}.union(*(walk(each, where) for each, where in below))

    return walk([json.loads(line) for line in whole(path).splitlines()], "")


def whole(path: Path) -> str:
    """The file's text, a JSON value a line."""
    text = path.read_text()
    return text if path.suffix == ".jsonl" else json.dumps(json.loads(text))


@pytest.mark.parametrize("name", read_back.FINISHED)
def test_a_finished_run_says_what_it_said(world: Path, name: str) -> None:
    same(read_back.run(world / name), written(world)["runs"][name])


def test_the_versions_of_a_study_with_a_schedule_are_known(world: Path) -> None:
    wanted = written(world)["versions"]
    assert read_back.versions(world / "daily") == wanted
    (champion,) = [number for number, _, in_use in wanted if in_use]
    assert f"released: version {champion}" in run("versions", "daily").output


COMMANDS = (
    ("status", "{run}", "--once"),
    ("models", "list"),
    ("models", "verify", "{run}"),
    ("models", "verify", "tiny"),
    ("evaluate", "{run}", "--data", "public.jsonl"),
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("name", read_back.FINISHED)
def test_every_command_that_only_reads_opens_a_run(
    world: Path, name: str, words: tuple[str, ...]
) -> None:
    wanted = written(world)["runs"][name]
    shown = run(*(word.format(run=name) for word in words))
    assert shown.exit_code == 0, shown.output
    quality = wanted["quality"]["after"][wanted["quality"]["metric"]]
    says = {
        "status": rounded_up(wanted["privacy"]["epsilon"]),
        "models verify {run}": wanted["digest"],
        "evaluate": f"{quality:.4g}",
    }
    for command, figure in says.items():
        if " ".join(words).startswith(command):
            assert figure in shown.output


@pytest.mark.parametrize("name", read_back.SITES)
def test_the_ledgers_commands_show_its_figures(world: Path, name: str) -> None:
    wanted = written(world)["sites"][name]
    shown = run("ledger", f"site-{name}.toml")
    assert shown.exit_code == 0, shown.output
    spent = max(cohort["epsilon"] for cohort in wanted["cohorts"])
    assert shown.output.split("spent")[1].split()[0] == rounded_up(spent)
    assert f"entry {wanted['head'][0]}, {wanted['head'][1][:16]}, verified" in shown.output
    review = run("review", "notes.toml", "--site", f"site-{name}.toml", "--digest")
    assert "Every round of this study is paid for here" in review.output
    assert run("doctor", f"site-{name}.toml").exit_code == 0


@pytest.mark.parametrize("name", read_back.FINISHED)
def test_a_report_is_rendered_again(world: Path, name: str) -> None:
    report.write(world / "again", read_report(world / name))
    again, first = ((world / at / "report.json").read_text() for at in ("again", name))
    assert again == first
    epsilon = written(world)["runs"][name]["privacy"]["epsilon"]
    assert f"ε = {rounded_up(epsilon)}" in (world / "again" / "report.md").read_text()


def test_an_adapter_is_exported_and_computes_what_the_run_computes(world: Path) -> None:
    done = run("export", "notes", "--to", "hf", "--out", "exported")
    assert done.exit_code == 0, done.output
    alone, ids = AutoModelForCausalLM.from_pretrained("exported"), torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.allclose(alone(ids).logits, load("notes").model(ids).logits, atol=1e-5)


KEYS = {"ledger.db": b'"noise_multiplier":', "ledger.head": b'"seq":', "ledger.receipt": b'"seq":'}


@pytest.mark.parametrize("file", KEYS)
def test_the_twin_with_one_byte_changed_is_refused(world: Path, file: str) -> None:
    change(world / "state-north" / file, KEYS[file])
    with pytest.raises(LedgerError):
        Ledger(world / "state-north").verify()
    assert run("ledger", "site-north.toml").exit_code == 4


def test_the_twin_of_a_checkpoint_is_refused(world: Path) -> None:
    change(world / "broken" / "checkpoint" / "run.db", b'"noise_multiplier":')
    with pytest.raises(CheckpointError, match="damaged"):
        read_back.checkpoint(world / "broken", world / "broken.toml")


def change(path: Path, key: bytes) -> None:
    """One bit of the number behind the first `key` in the file."""
    body = bytearray(path.read_bytes())
    at = body.index(key) + len(key)
    assert chr(body[at]).isdigit()
    body[at] ^= 1
    path.write_bytes(body)
