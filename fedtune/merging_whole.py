"""One model from several exported ones: `fedtune merge` on what `fedtune export --to hf` wrote."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedtune
from fedtune import budgets, report
from fedtune.errors import ConfigError, ModelError
from fedtune.export import TOKENIZER
from fedtune.files import drafted
from fedtune.models.base import find_base
from fedtune.models.digest import digest
from fedtune.models.merge import Method
from fedtune.models.merge_whole import merge_whole
from fedtune.models.whole import PLAN
from fedtune.runs import read_report


def exported(folder: Path) -> bool:
    """Whether `fedtune export --to hf` wrote it: a model with a report and no plan."""
    files = ("config.json", "report.json")
    return all((folder / name).is_file() for name in files) and not (folder / PLAN).exists()


def merge_models(
    folders: Sequence[Path],
    out: Path,
    *,
    method: Method,
    weights: Sequence[float],
    density: float,
    seed: int,
    disjoint: bool,
) -> dict[str, Any]:
    """Merge exported models of one base into the new folder `out`; returns its report's body.

    Guarantee: as merging.merge_runs. Errors: ConfigError, ModelError, InfrastructureError."""
    reports = [read_report(each, "base", "base.name", "base.digest") for each in folders]
    bases = {body["base"]["digest"]: body["base"]["name"] for body in reports}
    if len(bases) != 1:
        raise ConfigError(
            "the models were made of different bases", "exported runs of one base.digest"
        )
    ((pinned, name),) = bases.items()
    if any(body["base"].get("quantisation") for body in reports):
        raise ConfigError("a model of a quantised base: its differences are from other weights")
    base = find_base(name, pinned)
    digests = [digest(folder) for folder in folders]
    if len(set(digests)) != len(digests):
        raise ConfigError("two of the models are the same", "models that differ")
    open_ = [str(body.get("study")) for body in reports if not body.get("private")]
    warning = {"mode": "off", "warning": f"trained without privacy: {', '.join(open_)}"}
    shares = list(weights) or [1.0] * len(folders)
    body: dict[str, Any] = {
        "fedtune": fedtune.__version__,
        "study": out.name,
        "plan_digest": None,
        "private": not open_,
        "privacy": warning if open_ else budgets.composed(reports, disjoint=disjoint),
        "base": reports[0]["base"],
        "rounds": [],
        "merge": {
            "method": f"{method} (mergekit, whole models)",
            "weights": shares,
            "parents": [
                {
                    "study": each.get("study"),
                    "plan_digest": each.get("plan_digest"),
                    "adapter_digest": found,
                    "epsilon": each["privacy"].get("epsilon"),
                    "delta": each["privacy"].get("delta"),
                    "weight": share,
                }
                for each, found, share in zip(reports, digests, shares, strict=True)
            ],
        },
    }
    with drafted(out) as draft:
        try:
            merge_whole(base.path, folders, draft, shares, method, density, seed)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"mergekit cannot merge them ({type(error).__name__})") from None
        (draft / "mergekit_config.yml").unlink(missing_ok=True)  # this machine's paths
        for name in (*TOKENIZER, "generation_config.json"):
            if (base.path / name).is_file():
                shutil.copyfile(base.path / name, draft / name)
        report.write(draft, body)
        (draft / "report.md").rename(draft / "README.md")
    return body
