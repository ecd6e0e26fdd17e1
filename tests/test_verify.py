"""`fedtune verify`: what a run proves to who was not there, and every way to falsify it."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.errors import FedtuneError, NotGenuine, Refused
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.run_folder import load_plan
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.evidence import figures, fingerprints, sign
from fedtune.evidence.verify import Verified, verify
from tests.cli_kit import run as command
from tests.verify_kit import forged, lower, write_report

CHANGES = 1000


def test_epsilon_follows_from_what_the_sites_signed(signed: tuple[Path, Verified]) -> None:
    folder, found = signed
    report = json.loads((folder / "report.json").read_text())
    assert found.private and not found.trusted and found.simulated
    assert found.epsilon == report["privacy"]["epsilon"] and found.delta == 1e-4
    assert found.updates == 4 and {*found.sites} == {"north", "south"}
    assert "adapter/adapter_model.safetensors" in sign.list_covered(folder)
    assert not verify(folder, trust=found.signer).trusted  # a simulation's key is nobody's


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_byte_anywhere_is_refused(signed, tmp_path: Path, seed: int) -> None:
    """One byte of one file that is signed, or of the signature itself, and a file less or more."""
    folder, _ = signed
    copy = shutil.copytree(folder, tmp_path / "run")
    rng = random.Random(seed)
    names = [*sign.list_covered(folder), sign.SIGNATURE]
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


def test_a_report_with_another_epsilon_is_refused_whoever_signs_it(signed, tmp_path: Path) -> None:
    with pytest.raises(NotGenuine, match=r"epsilon is 0\.5.*follows from the sites' step logs"):
        verify(forged(signed[0], tmp_path, lower))


@pytest.mark.parametrize("site", [None, "north"])
def test_a_report_with_another_delta_than_the_plans_is_refused(
    signed, tmp_path: Path, site: str | None
) -> None:
    def less(report: dict[str, Any]) -> None:
        table = report["privacy"]["sites"][site] if site else report["privacy"]
        table["delta"] /= 2

    delta = re.escape(repr(load_plan(signed[0]).privacy.delta))
    with pytest.raises(NotGenuine, match=f"delta is .*expected {delta}, as it was signed"):
        verify(forged(signed[0], tmp_path, less))


@pytest.mark.parametrize("site", [None, "north"])
def test_a_report_with_other_records_of_a_unit_than_the_plans_is_refused(
    signed, tmp_path: Path, site: str | None
) -> None:
    """The best guess of an attacker follows from them: with fewer it would look worse."""

    def less(report: dict[str, Any]) -> None:
        table = report["privacy"]["sites"][site] if site else report["privacy"]
        table["records_per_unit"] = 0.5

    with pytest.raises(NotGenuine, match=r"records_per_unit is .*expected .*as it was signed"):
        verify(forged(signed[0], tmp_path, less))


def test_a_report_that_leaves_a_site_out_is_refused(signed, tmp_path: Path) -> None:
    def less(report: dict[str, Any]) -> None:
        del report["privacy"]["sites"]["north"]

    with pytest.raises(NotGenuine, match="sites is"):
        verify(forged(signed[0], tmp_path, less))


def test_what_a_coordinator_left_out_of_a_run_is_counted(signed, tmp_path: Path) -> None:
    """Signed by its own key, with figures that fit what is there: nobody can tell it from a site
    that was away, and so the ε of the whole plan stands beside the one that is proven."""
    folder, whole = signed
    assert not whole.absent
    copy = shutil.copytree(folder, tmp_path / "less")
    content = json.loads((copy / sign.EVIDENCE).read_text())
    content["updates"] = [e for e in content["updates"] if (e["site"], e["round"]) != ("north", 2)]
    (copy / sign.EVIDENCE).write_bytes(canonical(content))
    first = next(e for e in content["updates"] if e["site"] == "north")
    (log,) = json.loads(first["said"]["events"])
    report = json.loads((copy / "report.json").read_text())
    report["rounds"][1]["participants"].remove("north")
    steps = Steps(log["sigma"], log["q"], log["steps"], log["records"])
    spent = {"steps": log["steps"], "epsilon": epsilon([steps], 1e-4)}
    report["privacy"]["sites"]["north"] |= spent
    write_report(copy, report)
    sign.sign_files(copy, SigningKey())
    found = verify(copy)
    assert found.sites["north"]["epsilon"] == spent["epsilon"] < whole.sites["north"]["epsilon"]
    assert found.absent == {"north": {"rounds": 1, "epsilon": whole.sites["north"]["epsilon"]}}
    shown = command("verify", str(copy)).output
    assert (
        "not here     north: its updates of 1 of the plan's rounds; with one more answer to each ε"
        in shown
    )


@pytest.mark.parametrize("shares_noise", [False, True])
def test_a_round_that_was_repeated_counts_beside_the_rounds_that_are_missing(
    signed, shares_noise: bool
) -> None:
    """A site repeated round 1 after an interruption, with twice the sampling rate since it declared
    half the size, and was away in round 2: with it, three steps, two of them at the larger rate.

    Twin: with shared noise, its own noise alone gives the larger ε of the two."""
    folder, _ = signed
    study = load_plan(folder)
    if shares_noise:  # two of three sites are honest
        study = study.changed(secure_aggregation={"colluding": 1}, strategy={"min_sites": 3})
    content = json.loads((folder / sign.EVIDENCE).read_text())
    content["updates"] = [e for e in content["updates"] if (e["site"], e["round"]) != ("north", 2)]
    (log,) = json.loads(content["updates"][0]["said"]["events"])
    log |= {"steps": 1, "q": 0.25}
    logs = {"north": [log, log | {"q": 0.5}], "south": [log | {"steps": 2}]}
    found = figures.count_absent(content, study, {"update": logs, "answer": {}})
    sigma, records = log["sigma"], log["records"]
    alone = [Steps(sigma, 0.25, 1, records), Steps(sigma, 0.5, 2, records)]
    wanted = {"epsilon": epsilon(alone, 1e-4)}
    if shares_noise:
        both = [steps._replace(noise_multiplier=sigma * 2**0.5) for steps in alone]
        wanted = {"epsilon": epsilon(both, 1e-4), "fallback": epsilon(alone, 1e-4)}
    assert found == {"north": {"rounds": 1} | {k: pytest.approx(v) for k, v in wanted.items()}}


def test_of_a_strangers_plan_no_epsilon_is_computed_that_takes_long(signed) -> None:
    """Of 10⁸ sampled steps, which the folder says are not in it."""
    folder, _ = signed
    study = load_plan(folder).changed(training={"rounds": 10**6, "local_steps": 100})
    content = json.loads((folder / sign.EVIDENCE).read_text())
    log = json.loads(content["updates"][0]["said"]["events"])
    events = {"update": {"north": log, "south": log}, "answer": {}}
    found = figures.count_absent(content, study, events)
    assert found["north"] == {"rounds": 10**6 - 2}


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


@pytest.mark.parametrize("known", [False, True])
def test_a_teachers_cost_that_is_not_in_epsilon_is_named(
    signed, tmp_path: Path, known: bool
) -> None:
    """Twin: a teacher whose cost is in it."""
    teacher = {"name": "before", "cost": "was trained without privacy", "known": known}
    copy = forged(signed[0], tmp_path, lambda report: report.update(teacher=teacher))
    words = "Its teacher before was trained without privacy: ε is of this run's rounds alone"
    assert (words in verify(copy).left_out) is not known
    told = command("verify", copy, "--simulation")
    assert (f"NOT COVERED  by the coordinator's report: {words}" in told.output) is not known


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


@pytest.mark.parametrize("release", ["0.0.9", None])
def test_the_sentences_of_another_release_are_said_not_to_be_compared(
    signed, tmp_path: Path, release: str | None
) -> None:
    """Else a report that names another release says whatever it likes of its quality. Twin: a
    report of this release that says the same is refused."""

    def change(report: dict[str, Any]) -> None:
        report["quality"]["headline"] = ["It is better than the base."]
        report["fedtune"] = release or report["fedtune"]

    copy = forged(signed[0], tmp_path, change)
    told = command("verify", copy, "--simulation")
    if release is None:
        assert told.exit_code == 2 and "quality.headline is not what" in told.stderr
        return
    assert verify(copy).made_by == release and told.exit_code == 3
    assert "not compared the sentences about quality" in told.stdout
    assert f"fedtune {release} made the run" in " ".join(told.stderr.split())


def test_the_command_trusts_nobody_by_itself(signed, tmp_path: Path) -> None:
    folder, found = signed
    unknown = command("verify", folder)
    assert unknown.exit_code == 3 and "nobody vouches" in unknown.stderr
    assert (
        f"ε = {rounded_up(found.epsilon)}" in unknown.output and "2 sites signed" in unknown.output
    )
    known = command("verify", folder, "--trust", found.signer)  # which the folder itself told
    assert known.exit_code == 3 and "a simulation" in known.stderr
    assert "anybody can make one" in known.output and "as you gave it" not in known.output
    unchanged = command("verify", folder, "--simulation", "--json")
    data = json.loads(unchanged.output)
    assert unchanged.exit_code == 0 and data["epsilon"] == found.epsilon
    assert data["simulated"] is True and data["trusted"] is False
    other = command("verify", folder, "--trust", "0000 0000 0000 0000 0000")
    assert other.exit_code == 3 and "was signed by" in other.stderr
    forgery = command("verify", forged(folder, tmp_path, lower), "--trust", found.signer)
    assert forgery.exit_code == 3 and "was signed by" in forgery.stderr  # another key signed it
    assert command("verify", tmp_path / "forged").exit_code == 2
    assert command("verify", tmp_path / "nothing").exit_code == 2


def test_an_exported_model_carries_its_proof_and_a_forged_run_is_not_exported(
    signed, tmp_path: Path
) -> None:
    folder, found = signed
    assert command("export", folder, "--out", tmp_path / "model").exit_code == 0
    carried = verify(tmp_path / "model", trust=found.signer)
    assert "model.safetensors" in carried.not_signed
    assert carried == replace(found, exported=True, not_signed=carried.not_signed)
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
