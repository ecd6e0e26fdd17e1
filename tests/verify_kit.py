"""What test_verify.py and test_verify_attacks.py share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.evidence import sign
from fedtune.evidence.verify import Verified, verify
from fedtune.wire.keys import SigningKey
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
