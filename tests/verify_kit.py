"""What test_verify.py and test_verify_attacks.py share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.core.run_folder import load_plan, write_plan
from fedtune.core.wire import seal
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.evidence import sign
from fedtune.evidence.verify import Verified, verify
from tests.cli_kit import write_study
from tests.simulated import simulate


def make_signed(folder: Path, base: Path) -> tuple[Path, Verified]:
    """A run of two rounds at two sites, and what it proves."""
    study, run = write_study(folder, base), folder / "run"
    simulate(study, [folder / name / "site.toml" for name in ("north", "south")], run)
    return run, verify(run)


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


def of_own_keys(
    folder: Path,
    tmp_path: Path,
    log: list[dict[str, Any]],
    tables: dict[str, Any] | None = None,
) -> Path:
    """A run of one round whose sites, plan and coordinator are a forger's own: every signature in
    it fits, and each site's step log says `log`. tables: changes to the plan."""
    copy = shutil.copytree(folder, tmp_path / "own", dirs_exist_ok=True)
    plan = load_plan(copy)
    study = plan.changed(**(tables or {})).changed(training={"rounds": 1})
    write_plan(copy, study)
    content = json.loads((copy / sign.EVIDENCE).read_text())
    keys = {name: SigningKey() for name in content["sites"]}
    for name, site in content["sites"].items():
        site["signing"] = keys[name].public
    content["plan"] = study.digest
    content["updates"] = [e for e in content["updates"] if e["round"] == 1]
    for entry in content["updates"]:
        entry["said"]["events"] = json.dumps(log)
        header = seal.Header(**json.loads(entry["header"]))
        body = seal.digest_of(entry["arrays"], entry["said"])
        header = replace(header, plan=study.digest, base=study.base.digest or "", body=body)
        entry |= seal.seal(keys[entry["site"]], header)
    (copy / sign.EVIDENCE).write_bytes(canonical(content))
    report = json.loads((copy / "report.json").read_text())
    report |= {"rounds": report["rounds"][:1], "plan_digest": study.digest}
    for name, site in report["privacy"]["sites"].items():
        site |= {"key": keys[name].public, "steps": sum(event["steps"] for event in log)}
    write_report(copy, report)
    sign.sign_files(copy, SigningKey())
    return copy
