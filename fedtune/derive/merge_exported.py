"""Merge models that `fedtune export --to hf` wrote: `fedtune merge` on exported folders."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedtune
from fedtune import report
from fedtune.accounting import composed_epsilon
from fedtune.core.bases.digest import digest, read_json
from fedtune.core.bases.find import find_base
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.files.writing import drafted
from fedtune.core.run_folder import HEAD, is_exported, load_plan
from fedtune.derive.derived_run import derived_name
from fedtune.derive.export import TOKENIZER
from fedtune.derive.lineage import require_counted_base, warn_of_cost
from fedtune.derive.merge_methods import Method, densities_of
from fedtune.evidence.personal import refuse_personal
from fedtune.evidence.sign import RUN
from fedtune.evidence.verify import check_signed
from fedtune.report.declared import declared_in
from fedtune.report.run_files import check_new, read_report


def merge_models(
    folders: Sequence[Path],
    out: Path | str,
    *,
    method: Method = "linear",
    weights: Sequence[float] = (),
    density: float | Sequence[float] = 0.5,
    seed: int = 0,
    disjoint: bool = False,
) -> dict[str, Any]:
    """Merge whole models that `export` made of runs of one base, and write the result to a new
    folder; return its report.

    - folders: two or more folders that `export` wrote
    - out: the new folder. It is not made if an error occurs
    - method: linear, ties, dare or slerp, each as `merge` describes it
    - weights: one for each model; by default 1 each
    - density: for ties and dare, the share of each model's changes that is kept: one number, or one
      for each model
    - seed: for dare, decides the random choice
    - disjoint: the caller states that no person is in two of the runs

    Guarantee: this is post-processing of released models. The new model's ε is composed as in
    accounting/composed_epsilon.py.

    Errors: ConfigError, ModelError, InfrastructureError; NeverLeaves for a personal model; Refused
    if the models' base is itself an exported model."""
    out = Path(out)
    check_new(out)
    for folder in folders:
        refuse_personal(folder)
    reports = _reports(folders)
    base = find_base(reports[0]["base"]["name"], reports[0]["base"]["digest"])
    require_counted_base(base.path, "parent")
    digests = [digest(folder) for folder in folders]
    if len(set(digests)) != len(digests):
        raise ConfigError("two of the models are the same", "models that differ")
    warning = warn_of_cost(reports)
    privacy: dict[str, Any] = {"mode": "off", "warning": warning}
    if not warning:
        privacy = composed_epsilon.compose_reports(reports, disjoint=disjoint)
    shares = list(weights) or [1.0] * len(folders)
    densities = densities_of(density, len(folders))
    merged_report: dict[str, Any] = declared_in(reports) | {
        "fedtune": fedtune.__version__,
        "study": derived_name(out, "merged"),
        "plan_digest": None,
        "private": not warning,
        "privacy": privacy,
        "base": reports[0]["base"],
        "rounds": [],
        "merge": {
            "method": f"{method} (mergekit, whole models)",
            "weights": shares,
            "parents": [_parent(*parent) for parent in zip(reports, digests, shares, strict=True)],
        },
    }
    with drafted(out) as draft:
        try:
            _run_mergekit(base.path, folders, draft, shares, method, densities, seed)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"mergekit cannot merge these models ({type(error).__name__})"
            ) from None
        (draft / "mergekit_config.yml").unlink(missing_ok=True)  # this machine's paths
        for name in (*TOKENIZER, "generation_config.json"):
            if (base.path / name).is_file():
                shutil.copyfile(base.path / name, draft / name)
        report.write(draft, merged_report)
        (draft / "report.md").rename(draft / "README.md")
    return merged_report


def _parent(report: dict[str, Any], adapter: str, weight: float) -> dict[str, Any]:
    return {
        "study": report.get("study"),
        "plan_digest": report.get("plan_digest"),
        "adapter_digest": adapter,
        "epsilon": report["privacy"].get("epsilon"),
        "delta": report["privacy"].get("delta"),
        "weight": weight,
    }


def _classifies(folder: Path) -> bool:
    listed = str(read_json(folder / "config.json").get("architectures"))
    return "ForSequenceClassification" in listed or (folder / HEAD).is_file()


def _reports(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Check that the folders are exported language models of one base. Return the content of their
    files report.json, in the same order, as far as they can be from the signed runs beside the
    models. Errors: ConfigError, NotGenuine."""
    if len(folders) < 2:
        raise ConfigError(f"{len(folders)} model given", "two or more to merge")
    if not all(map(is_exported, folders)):
        odd = next(folder for folder in folders if not is_exported(folder))
        raise ConfigError(f"{odd}: not an exported model", "only runs, or only exported models")
    if any(map(_classifies, folders)):
        raise ConfigError(
            "an exported classifier cannot be merged: its head is part of its weights",
            "exported language models",
        )
    reports = [
        read_report(_signed_run(folder), "base", "base.name", "base.digest") for folder in folders
    ]
    if len({report_body["base"]["digest"] for report_body in reports}) != 1:
        raise ConfigError(
            "the models were made from different bases", "exported runs of one base.digest"
        )
    if any(map(_is_quantised, folders, reports)):
        raise ConfigError(
            "an exported model of a quantised base cannot be merged: its weights differ from those "
            "of the base by the quantisation too",
            "exported models of a base that is not quantised",
            "merge the runs in place of the exported models",
        )
    return reports


def _is_quantised(folder: Path, report: dict[str, Any]) -> bool:
    """Return whether an exported model's base was quantised: by the plan of the run that was
    exported with it, or by the model's own report if there is no such run. A run's report does not
    say it. report: the report that counts for the model."""
    if (run := folder / RUN).is_dir():
        return load_plan(run).base.quantisation is not None
    return bool(report["base"].get("quantisation"))


def _signed_run(folder: Path) -> Path:
    """Return the folder whose report.json counts for an exported model: that of the run that was
    exported with it, verified, or the model's own if there is none. No signature covers the latter.
    Errors: NotGenuine."""
    if not (run := folder / RUN).is_dir():
        return folder
    check_signed(run)
    return run


# mergekit's names; all but slerp work on differences from the base.
_NAMES = {"linear": "task_arithmetic", "ties": "ties", "dare": "dare_linear", "slerp": "slerp"}


def _run_mergekit(
    base: Path,
    models: Sequence[Path],
    out: Path,
    weights: Sequence[float],
    method: Method,
    densities: Sequence[float],
    seed: int,
) -> None:
    """Merge transformers folders that were fine-tuned from `base`; write the result in fp32 to the
    folder `out`.

    - base: the folder of the base
    - models: the folders that `fedtune export --to hf` wrote
    - weights, densities: one for each model; densities are the shares that ties and dare keep
    - method: linear, ties, dare or slerp
    - seed: decides dare's random choice

    Errors: ConfigError (no such method for whole models, or mergekit is missing)."""
    if method not in _NAMES:
        raise ConfigError(
            f"--method {method} works on adapters only", f"one of {', '.join(_NAMES)}",
            "merge the runs themselves before they are exported",
        )  # fmt: skip
    if method == "slerp" and len(models) != 2:
        raise ConfigError("slerp merges exactly two models", "two models", "use linear")
    try:
        with warnings.catch_warnings():  # mergekit's import warns of NumPy names that it uses
            warnings.simplefilter("ignore", DeprecationWarning)
            from mergekit.config import MergeConfiguration
            from mergekit.merge import run_merge
            from mergekit.options import MergeOptions
    except ImportError:
        raise ConfigError(
            "merging whole models needs mergekit, which is not installed",
            todo="pip install 'fedtune[merge]', or merge the runs before they are exported",
        ) from None
    logging.getLogger("mergekit").setLevel(logging.ERROR)
    model_entries: list[dict[str, Any]] = [
        {"model": str(model), "parameters": {"weight": weight, "density": density}}
        for model, weight, density in zip(models, weights, densities, strict=True)
    ]
    settings: dict[str, Any] = {
        "merge_method": _NAMES[method],
        "base_model": str(base),
        "models": model_entries,
        "dtype": "float32",
    }
    if method == "slerp":
        share = weights[1] / sum(weights)
        settings |= {"base_model": str(models[0]), "parameters": {"t": share}}
        settings["models"] = [{"model": str(model)} for model in models]
    else:
        settings["parameters"] = {"normalize": False}
    config = MergeConfiguration.model_validate(settings)
    options = MergeOptions(
        random_seed=seed, quiet=True, write_model_card=False, copy_tokenizer=False
    )
    run_merge(config, str(out), options)
