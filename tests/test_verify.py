"""`fedtune verify`: what a run proves to who was not there, and every way to falsify it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import load_site, load_study
from fedtune.errors import FedtuneError, Refused
from fedtune.evidence import sign
from fedtune.evidence.verify import NotGenuine, Verified, verify
from fedtune.launch import simulate as launch
from fedtune.report.claim import rounded_up
from fedtune.run_folder import load_plan
from fedtune.wire import fingerprints
from fedtune.wire.keys import SigningKey, canonical
from tests.cli_kit import run as command
from tests.cli_kit import write_study
from tests.simulated import simulate
from tests.test_end_to_end import lay_out

CHANGES = 1000
PRIVACY = '{ epsilon = 8.0, noise_multiplier = 2.0, delta = 1e-3, unit = "patient" }'


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Verified]:
    """A run of two rounds at two sites, and what it proves."""
    study = write_study(tmp_path_factory.mktemp("signed"), tiny_base)
    folder, sites = (
        study.parent / "run",
        [study.parent / n / "site.toml" for n in ("north", "south")],
    )
    simulate(study, sites, folder)
    return folder, verify(folder)


def test_epsilon_follows_from_what_the_sites_signed(signed: tuple[Path, Verified]) -> None:
    folder, found = signed
    report = json.loads((folder / "report.json").read_text())
    assert found.private and not found.trusted and found.simulated
    assert found.epsilon == report["privacy"]["epsilon"] and found.delta == 1e-4
    assert found.updates == 4 and {*found.sites} == {"north", "south"}
    assert "adapter/adapter_model.safetensors" in sign.covered(folder)
    assert verify(folder, trust=found.signer).trusted


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_byte_anywhere_is_refused(signed, tmp_path: Path, seed: int) -> None:
    """One byte of one file that is signed, or of the signature itself, and a file less or more."""
    folder, _ = signed
    copy = shutil.copytree(folder, tmp_path / "run")
    rng = random.Random(seed)
    names = [*sign.covered(folder), sign.SIGNATURE]
    for number in range(CHANGES // 4):
        path = copy / names[number % len(names)]
        whole = path.read_bytes()
        at, how = rng.randrange(len(whole)), rng.randrange(3)
        other = bytes([rng.choice([n for n in range(256) if n != whole[at]])])
        space = rng.choice([b" ", b"\n", b"="])
        changed = [
            whole[:at] + other + whole[at + 1 :],
            whole[:at] + space + whole[at:],
            whole[:at] + whole[at + 1 :],
        ][how]
        path.write_bytes(changed)
        with pytest.raises(FedtuneError) as raised:
            verify(copy)
        assert path.name in str(raised.value), (path, how, at)
        path.write_bytes(whole)
    verify(copy)


def test_a_file_that_is_added_or_removed_is_named(signed, tmp_path: Path) -> None:
    folder, _ = signed
    copy = shutil.copytree(folder, tmp_path / "run")
    extra = copy / "adapter" / "modeling.py"
    extra.write_text("pass")
    with pytest.raises(NotGenuine, match=r"modeling\.py: was added"):
        verify(copy)
    extra.unlink()
    (copy / "report.md").unlink()
    with pytest.raises(NotGenuine, match=r"report\.md: is missing"):
        verify(copy)
    shutil.copy(folder / "report.json", copy / "report.md")
    with pytest.raises(NotGenuine, match=r"report\.md: was changed"):
        verify(copy)
    shutil.copy(folder / "report.md", copy / "report.md")
    (copy / "notes.txt").write_text("beside it")
    assert "notes.txt" in verify(copy).not_signed


def write_report(folder: Path, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n")


def forged(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose report is changed, and signed again with a key of the forger's."""
    copy = shutil.copytree(folder, tmp_path / "forged", dirs_exist_ok=True)
    report = json.loads((copy / "report.json").read_text())
    change(report)
    write_report(copy, report)
    sign.sign_files(copy, SigningKey())
    return copy


def lower(report: dict[str, Any]) -> None:
    report["privacy"]["epsilon"] = 0.5
    for site in report["privacy"]["sites"].values():
        site["epsilon"] = 0.5


def test_a_report_with_another_epsilon_is_refused_whoever_signs_it(signed, tmp_path: Path) -> None:
    with pytest.raises(NotGenuine, match=r"epsilon is 0\.5.*follows from the sites' step logs"):
        verify(forged(signed[0], tmp_path, lower))


def test_a_report_that_leaves_a_site_out_is_refused(signed, tmp_path: Path) -> None:
    def less(report: dict[str, Any]) -> None:
        del report["privacy"]["sites"]["north"]

    with pytest.raises(NotGenuine, match="sites is"):
        verify(forged(signed[0], tmp_path, less))


def test_a_round_that_nobody_signed_is_refused(signed, tmp_path: Path) -> None:
    def more(report: dict[str, Any]) -> None:
        report["rounds"].append({**report["rounds"][-1], "round": 3})

    with pytest.raises(NotGenuine, match="who took part in round 3"):
        verify(forged(signed[0], tmp_path, more))


def test_who_replaces_every_key_is_refused_by_trust_alone(signed, tmp_path: Path) -> None:
    """Nothing in such a folder contradicts itself: only somebody else's word tells them apart."""
    folder, found = signed
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / sign.EVIDENCE).read_text())
    keys = {name: SigningKey() for name in content["sites"]}
    owner = SigningKey()
    for entry in content["updates"]:
        header = json.loads(entry["header"]) | {"receiver": owner.public}
        text = canonical(header)
        entry["header"] = text.decode()
        entry["signature"] = keys[entry["site"]].sign(b"fedtune update\0" + text)
    for name, key in keys.items():
        content["sites"][name]["signing"] = key.public
    (copy / sign.EVIDENCE).write_bytes(canonical(content))
    report = json.loads((copy / "report.json").read_text())
    for name, key in keys.items():
        report["privacy"]["sites"][name]["key"] = key.public
    write_report(copy, report)
    sign.sign_files(copy, owner)
    assert verify(copy).epsilon == found.epsilon
    with pytest.raises(Refused, match="was signed by"):
        verify(copy, trust=found.signer)


def test_fewer_steps_than_were_signed_need_the_sites_key(signed, tmp_path: Path) -> None:
    """Twin: the same folder, unless a step log is changed in it."""
    copy = shutil.copytree(signed[0], tmp_path / "copy")
    content = json.loads((copy / sign.EVIDENCE).read_text())
    (copy / sign.EVIDENCE).write_bytes(canonical(content))
    sign.sign_files(copy, SigningKey())
    verify(copy)
    last = content["updates"][-1]
    events = json.loads(last["said"]["events"])
    events[0]["sigma"] *= 4
    last["said"]["events"] = json.dumps(events)
    (copy / sign.EVIDENCE).write_bytes(canonical(content))
    sign.sign_files(copy, SigningKey())
    with pytest.raises(NotGenuine, match="sealed for another body"):
        verify(copy)


def test_a_consortiums_run_is_of_its_own_coordinator(signed, tmp_path: Path) -> None:
    """Where a CA stands behind the signer, no update may be sealed for another coordinator."""
    copy = shutil.copytree(signed[0], tmp_path / "copy")
    key = SigningKey()
    sign.sign_files(copy, key, "-----BEGIN CERTIFICATE-----")
    with pytest.raises(NotGenuine, match="sealed for another coordinator"):
        verify(copy)
    with pytest.raises(NotGenuine, match="another coordinator"):
        verify(copy, trust=fingerprints.of_consortium("-----BEGIN CERTIFICATE-----", key.public))


def test_a_sites_own_fingerprint_is_compared(signed, tmp_path: Path) -> None:
    folder, _ = signed
    with pytest.raises(Refused, match="'north' signed with keys of fingerprint unknown"):
        verify(folder, sites={"north": "0000 0000 0000 0000 0000"})
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / sign.EVIDENCE).read_text())
    content["sites"]["north"] |= {"node": "PEM", "tls": "00"}
    (copy / sign.EVIDENCE).write_bytes(canonical(content))
    sign.sign_files(copy, SigningKey())
    own = fingerprints.of_site("north", "PEM", "00", content["sites"]["north"]["signing"])
    assert verify(copy, sites={"north": own.replace(" ", "-")}).sites["north"]["fingerprint"] == own


def test_the_command_trusts_nobody_by_itself(signed, tmp_path: Path) -> None:
    folder, found = signed
    unknown = command("verify", folder)
    assert unknown.exit_code == 3 and "signer unknown" in unknown.stderr
    assert (
        f"ε = {rounded_up(found.epsilon)}" in unknown.output and "2 sites signed" in unknown.output
    )
    known = command("verify", folder, "--trust", found.signer)
    assert known.exit_code == 0 and "(trusted)" in known.output
    data = json.loads(command("verify", folder, "--trust", found.signer, "--json").output)
    assert data["epsilon"] == found.epsilon and data["trusted"] is True
    other = command("verify", folder, "--trust", "0000 0000 0000 0000 0000")
    assert other.exit_code == 3 and "was signed by" in other.stderr
    forgery = command("verify", forged(folder, tmp_path, lower), "--trust", found.signer)
    assert forgery.exit_code == 3  # another key signed it
    assert command("verify", tmp_path / "forged").exit_code == 2
    assert command("verify", tmp_path / "nothing").exit_code == 2


def test_an_exported_model_carries_its_proof_and_a_forged_run_is_not_exported(
    signed, tmp_path: Path
) -> None:
    folder, found = signed
    assert command("export", folder, "--out", tmp_path / "model").exit_code == 0
    carried = verify(tmp_path / "model", trust=found.signer)
    assert "model.safetensors" in carried.not_signed
    assert carried == replace(found, trusted=True, exported=True, not_signed=carried.not_signed)
    bad = forged(folder, tmp_path, lower)
    refused = command("export", bad, "--out", tmp_path / "bad")
    assert refused.exit_code == 2 and "step logs" in refused.stderr
    assert not (tmp_path / "bad").exists()


def test_what_is_signed_is_the_plan_that_ran(signed) -> None:
    folder, found = signed
    assert load_plan(folder).digest == found.plan


def test_other_tools_come_to_the_same(signed, tmp_path: Path) -> None:
    """The page's own lines, in a run's folder."""
    for tool in ("jq", "xxd", "sha256sum", "openssl"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    page = (Path(__file__).parents[1] / "docs/verify.md").read_text()
    script = page.split("```bash\n")[1].split("```")[0].replace("/tmp/", f"{tmp_path}/")
    folder, found = signed

    def lines(run: Path) -> subprocess.CompletedProcess[str]:
        given = ["bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(given, cwd=run, capture_output=True, text=True, check=False)

    said = lines(folder)
    assert said.returncode == 0, said.stderr
    assert "Signature Verified Successfully" in said.stdout
    assert said.stdout.split()[-1] == found.signer.replace(" ", "")
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "report.md").write_text("ε = 0.5")
    assert lines(copy).returncode != 0
    shutil.copy(folder / "report.md", copy / "report.md")
    content = json.loads((copy / sign.SIGNATURE).read_text())
    (copy / sign.SIGNATURE).write_bytes(canonical(content | {"ca": "other"}))
    assert lines(copy).returncode != 0


def test_verifying_needs_no_torch(signed) -> None:
    folder, _ = signed
    code = (
        "import sys; from fedtune.evidence.verify import verify; "
        f"verify({str(folder)!r}); assert not {{'torch', 'flwr'}} & {{*sys.modules}}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_genuine_run_inside_a_false_one_proves_nothing_of_it(signed, tmp_path: Path) -> None:
    folder, found = signed
    false = shutil.copytree(folder, tmp_path / "false")
    for name in (sign.SIGNATURE, sign.EVIDENCE):
        (false / name).unlink()
    shutil.copytree(folder, false / "run")
    with pytest.raises(NotGenuine, match="is not signed"):
        verify(false, trust=found.signer)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "run").symlink_to(folder)
    with pytest.raises(NotGenuine, match="is a link"):
        verify(tmp_path / "model", trust=found.signer)
    command("export", false, "--out", tmp_path / "card")
    assert "by a report that nobody signed" in (tmp_path / "card" / "README.md").read_text()


def again(copy: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """evidence.json changed, and signed for by a coordinator who lies."""
    content = json.loads((copy / sign.EVIDENCE).read_text())
    change(content)
    (copy / sign.EVIDENCE).write_bytes(canonical(content))
    sign.sign_files(copy, SigningKey())
    return copy


def test_a_coordinator_cannot_leave_a_round_out(signed, tmp_path: Path) -> None:
    copy = shutil.copytree(signed[0], tmp_path / "copy")
    report = json.loads((copy / "report.json").read_text())
    report["rounds"] = report["rounds"][:1]
    write_report(copy, report)

    def first(content: dict[str, Any]) -> None:
        content["updates"] = [e for e in content["updates"] if e["round"] == 1]

    with pytest.raises(NotGenuine, match="has 1 rounds; expected all 2 rounds"):
        verify(again(copy, first))
    report["rounds"] = []
    write_report(copy, report)
    with pytest.raises(NotGenuine, match="has 0 rounds"):
        verify(again(copy, lambda content: content.update(updates=[])))


def test_no_other_work_of_a_site_counts_as_an_update(signed, tmp_path: Path) -> None:
    copy = shutil.copytree(signed[0], tmp_path / "copy")

    def answered(content: dict[str, Any]) -> None:
        content["updates"][0]["said"]["status"] = "answered"

    with pytest.raises(NotGenuine, match="another kind of work"):
        verify(again(copy, answered))


@pytest.mark.parametrize("name", ["report.md", "evidence.json", "adapter/adapter_config.json"])
def test_a_pipe_or_a_link_in_a_files_place_is_refused(signed, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(signed[0], tmp_path / "copy")
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(NotGenuine, match="no regular file"):
        verify(copy)
    (copy / name).unlink()
    (copy / name).symlink_to(signed[0] / name)
    with pytest.raises(NotGenuine, match="was changed"):
        verify(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"privacy": []}, {"rounds": [{"round": "1"}]}, {"rounds": None}, {"continuous": []},
        {"study": "other"}, {"plan_digest": "sha256:0"}, {"private": 1},
    ],
)  # fmt: skip
def test_a_report_that_is_none_has_a_named_error(signed, tmp_path: Path, change) -> None:
    with pytest.raises(FedtuneError) as raised:
        verify(forged(signed[0], tmp_path, lambda report: report.update(change)))
    assert raised.value.exit_code == 2


def test_what_is_printed_of_a_folder_cannot_pose_as_a_line(signed, tmp_path: Path) -> None:
    copy = shutil.copytree(signed[0], tmp_path / "copy")
    (copy / "a\nprivacy      ε = 0.01, 40 sites\x1b[2J").write_text("")
    shown = command("verify", copy).output
    assert shown.count("\nprivacy ") == 1 and "\x1b" not in shown


def test_a_run_whose_sites_answered_a_private_evaluation(tmp_path: Path, tiny_base: Path) -> None:
    """Their logs are checked too, and an answer left out is missed."""
    from tests.private_evaluation_kit import world

    (tmp_path / "queried").mkdir()
    study = world(tmp_path / "queried", tiny_base, 3.0)
    run = tmp_path / "run"
    simulate(study, sorted(study.parent.glob("site-*.toml")), run)
    verify(run)
    copy = shutil.copytree(run, tmp_path / "less")

    def silent(content: dict[str, Any]) -> None:
        content["updates"] = [e for e in content["updates"] if e["kind"] == "update"]

    with pytest.raises(NotGenuine, match="evaluation's sites"):
        verify(again(copy, silent))


def test_a_study_with_a_schedule_and_a_rollback(tmp_path: Path, tiny_base: Path) -> None:
    """What is exported of it verifies; another version in use does not, unless it is signed for by
    the key in the coordinator's home beside the runs, over a run that verified before."""
    text = lay_out(tmp_path, tiny_base, PRIVACY).read_text().replace("rounds = 3\n", "")
    study = tmp_path / "study.toml"
    study.write_text(text + '[schedule]\nevery = "1h"\nconfidence = 0.501\n')
    run, home = tmp_path / "runs" / "daily", tmp_path / "coordinator"
    sites = sorted(tmp_path.glob("site-*.toml"))
    key = SigningKey.at(home / "signing.key")
    launch.simulate(load_study(study), [load_site(path) for path in sites], run, rounds=3, key=key)
    found = verify(run)
    assert found.sites and found.not_signed
    sign.carry(run, tmp_path / "model")
    assert verify(tmp_path / "model").exported
    in_use = os.readlink(run / "adapter")
    (run / "adapter").unlink()
    (run / "adapter").symlink_to("versions/0")
    with pytest.raises(NotGenuine, match="not the version that the report is of"):
        verify(run)
    (run / "adapter").unlink()
    (run / "adapter").symlink_to(in_use)
    assert command("versions", run, "--rollback", 0).exit_code == 0
    assert verify(run).signer == found.signer
    weights = run / "versions" / "0" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole + b" ")
    command("versions", run, "--unpin")
    weights.write_bytes(whole)
    with pytest.raises(NotGenuine, match="was changed after it was signed"):
        verify(run)  # it was not as it had been signed, so nobody signed it again
