"""Merge the adapters of several finished runs: `fedtune merge`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.accounting import composed_epsilon
from fedtune.core.config import LoraTable, Study
from fedtune.core.errors import ConfigError
from fedtune.core.models import lora
from fedtune.core.models.adapter_files import pick_arrays
from fedtune.core.models.lora import Arrays
from fedtune.derive import derived_run
from fedtune.derive.adapter_files import save_adapter
from fedtune.derive.lineage import require_counted_base, warn_of_cost
from fedtune.derive.merge_methods import Adapter, Method, Moments, densities_of, merge
from fedtune.evidence.verify import check_signed
from fedtune.report.declared import declared_in
from fedtune.report.run_files import check_new, new_folder, read_report
from fedtune.runs.run import Run

if TYPE_CHECKING:
    from fedtune.evaluation.evaluator import Evaluator


@dataclass(frozen=True, repr=False)
class Parent:
    """A finished run to merge.

    - run: the run
    - study: its plan
    - report: the content of its report.json
    - arrays: its adapter's arrays, by parameter name"""

    run: Run
    study: Study
    report: dict[str, Any]
    arrays: Arrays

    @property
    def table(self) -> LoraTable:
        assert self.study.lora is not None  # load_parent has checked it
        return self.study.lora

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.arrays, self.table.scaling)


def load_parent(run: Run) -> Parent:
    """Load a finished run for merging, after a check of its signature if it has one.

    Errors: InputError, ConfigError or ModelError if the run is unfinished or has no adapter;
    NotGenuine if it was changed after it was signed; Refused if its base is an exported model."""
    check_signed(run.folder)
    require_counted_base(Path(run.study.base.model), "parent")
    if run.study.lora is None:
        raise ConfigError(
            f"{run.folder}: trained a head and no adapter",
            "a run with a [lora] table",
            "leave it out",
        )
    return Parent(run, run.study, read_report(run.folder, "base"), run.adapter())


def merge_runs(
    runs: Sequence[Run],
    out: Path | str,
    *,
    method: Method = "linear",
    weights: Sequence[float] = (),
    density: float | Sequence[float] = 0.5,
    rank: int | None = None,
    seed: int = 0,
    disjoint: bool = False,
    measure: bool = True,
) -> Run:
    """Merge the adapters of finished runs of one base into a new run.

    Args:
        runs: two or more finished runs whose plans pin the same base.
        out: the new run's folder. It is not made if an error occurs.
        method: linear: the exact weighted sum of the updates. svd: this sum, reduced to a smaller
            rank. ties, dare: the sum of a part of each update. slerp: interpolation of two updates
            along the arc between them. regmean: least squares on the layers' inputs from each
            parent's own public text.
        weights: one for each run; by default 1 each, and so equal shares for slerp.
        density: for ties and dare, the share of each update that is kept: one number, or one for
            each run.
        rank: for svd, ties and dare, the merged rank.
        seed: for dare, decides the random choice.
        disjoint: the caller states that no person is in two of the runs.
        measure: whether to evaluate base, parent and merged adapter on each parent's evaluation
            file, if the file exists.

    Guarantee: this is post-processing of released adapters. The new run's ε is composed as in
    accounting/composed_epsilon.py.

    Errors: InputError, ConfigError, ModelError, InfrastructureError, NotGenuine, Refused."""
    out = Path(out)
    check_new(out)
    if len(runs) < 2:
        raise ConfigError(f"{len(runs)} run given", "two or more to merge")
    parents = [load_parent(run) for run in runs]
    _check_same_base(parents)
    shares = list(weights) or [1.0] * len(parents)
    moments = [_moments(parent) for parent in parents] if method == "regmean" else []
    arrays, merged_rank = merge(
        [parent.adapter for parent in parents], shares, method,
        density=density, rank=rank, seed=seed, moments=moments,
    )  # fmt: skip
    table = _merged_lora(parents, merged_rank)
    # The plan describes the merged adapter's shape; the privacy cost is in the report alone.
    study = derived_run.derived_study(parents[0].study, out, "merged", lora=table)
    settings: dict[str, Any] = {"method": method, "weights": shares, "rank": merged_rank}
    densities = densities_of(density, len(parents))
    one = len(set(densities)) == 1
    settings |= (
        {"density": densities[0] if one else densities} if method in ("ties", "dare") else {}
    )
    settings |= {"seed": seed} if method == "dare" else {}
    sections = _report_sections(parents, study, arrays, settings, disjoint)
    if measure:
        sections["merge"]["kept"] = _measure_parents(parents, table, arrays)
    with new_folder(out) as draft:
        save_adapter(draft / "adapter", runs[0].folder / "adapter", study, arrays)
        derived_run.write(draft, study, sections)
    return Run(out)


def _check_same_base(parents: Sequence[Parent]) -> None:
    """Check that all parents were trained on one base, by its digest, quantised in the same way,
    and that no two have the same adapter. Errors: ConfigError."""
    first = parents[0]
    for parent in parents:
        both = f"{first.run.folder} and {parent.run.folder}"
        mine, other = first.study.base.digest, parent.study.base.digest
        if mine is None or mine != other:
            raise ConfigError(
                f"{both}: trained on different bases ({mine}, {other})",
                "runs whose plans pin the same base.digest",
                "leave one of them out: an adapter is a change of its own base",
            )
        if parent.study.base.quantisation != first.study.base.quantisation:
            raise ConfigError(
                f"{both}: their bases are quantised in different ways",
                "runs with the same [base.quantisation]",
            )
    folder_by_digest: dict[str, Path] = {}
    for parent in parents:
        digest, folder = lora.digest(parent.arrays), parent.run.folder
        if digest in folder_by_digest:
            raise ConfigError(
                f"{folder_by_digest[digest]} and {folder}: hold the same adapter",
                "two different adapters",
            )
        folder_by_digest[digest] = folder


def _merged_lora(parents: Sequence[Parent], rank: int) -> LoraTable:
    """Build the LoRA table of the merged adapter. It has the modules of all parents, and the
    largest of the parents' numbers of last layers, or all layers if one parent has all. Its alpha
    is `rank`, so that the scaling is 1. rank: the rank of the merged adapter."""
    last = [parent.table.last_layers for parent in parents]
    return LoraTable(
        rank=rank,
        alpha=float(rank),
        modules=tuple(dict.fromkeys(m for parent in parents for m in parent.table.modules)),
        last_layers=None if None in last else max(n for n in last if n),
        train="AB",
    )


def _report_sections(
    parents: Sequence[Parent],
    study: Study,
    arrays: Arrays,
    settings: dict[str, Any],
    disjoint: bool,
) -> dict[str, Any]:
    """Return the sections of a merged run's report.

    - parents: the runs that were merged
    - study: the merged run's plan
    - arrays: the merged adapter, by name
    - settings: the section "merge" without its parents; its "weights" has one for each parent
    - disjoint: whether the caller states that no person is in two of the runs"""
    reports = [parent.report for parent in parents]
    if warning := warn_of_cost(reports):
        privacy: dict[str, Any] = {"mode": "off", "warning": warning}
    else:
        privacy = composed_epsilon.compose_reports(reports, disjoint=disjoint)
    return declared_in(reports) | {
        "private": not warning,
        "privacy": privacy,
        "base": parents[0].report["base"],
        "adapter": {
            "digest": lora.digest(arrays),
            "parameters": int(sum(array.size for array in arrays.values())),
            **derived_run.adapter_facts(study.lora),
        },
        "merge": settings
        | {
            "parents": [
                {
                    "study": parent.report.get("study"),
                    "plan_digest": parent.report.get("plan_digest"),
                    "adapter_digest": lora.digest(parent.arrays),
                    "epsilon": parent.report["privacy"].get("epsilon"),
                    "delta": parent.report["privacy"].get("delta"),
                    "weight": weight,
                }
                for parent, weight in zip(parents, settings["weights"], strict=True)
            ],
        },
    }


# ------------------------------------------------------------------------------------ measure


def _measure_parents(
    parents: Sequence[Parent], table: LoraTable, arrays: Arrays
) -> list[dict[str, Any]]:
    """On each parent's evaluation file, evaluate the base, this parent and the merged adapter; a
    parent whose file does not exist is left out. Return one row per parent: "parent" (its number
    from 1), "metric", the values "base", "alone" (of the parent) and "merged", and "kept". "kept"
    is the share of the parent's gain over the base that the merged adapter keeps; None if the
    parent's value equals the base's.

    table, arrays: LoRA table and arrays of the merged adapter."""
    rows = []
    for number, parent in enumerate(parents, 1):
        evaluation = parent.study.evaluation
        if evaluation is None or not evaluation.path.exists():
            continue
        base, alone = _measure_metric(parent.study, parent.table, parent.arrays)
        _, merged = _measure_metric(parent.study, table, arrays)
        gain = alone - base
        kept = (merged - base) / gain if gain else None
        rows.append(
            {"parent": number, "metric": evaluation.metric, "base": base}
            | {"alone": alone, "merged": merged, "kept": kept}
        )
    return rows


def _measure_metric(study: Study, table: LoraTable, arrays: Arrays) -> tuple[float, float]:
    """Measure the study's metric on its evaluation records. Return its value for the base alone and
    its value with an adapter, whose LoRA table is `table` and whose arrays are `arrays`."""
    ready = evaluator(study, table, arrays)
    trained = pick_arrays(arrays, ready.network.parameters(), Path("adapter"))
    base, after = ready.measure(None), ready.measure(trained)
    return base[ready.metric], after[ready.metric]


def evaluator(study: Study, table: LoraTable, arrays: Arrays) -> Evaluator:
    """Return an evaluator that measures adapters with the LoRA table `table` on the study's
    evaluation records. arrays: an adapter's arrays by name; the evaluator takes A from them, so it
    can measure only adapters with the same A."""
    from fedtune.evaluation.evaluator import Evaluator

    return Evaluator(_with_saved_factor(study, table), _select_frozen(arrays))


def _moments(parent: Parent) -> Moments:
    """Compute the second moments E[x xᵀ] of the inputs x of each layer that the parent adapted, on
    the parent's own public text, with its adapter loaded. Return them by layer. This costs no ε,
    since the text is public and the adapter was released. Errors: ConfigError if the text is not on
    this machine."""
    from fedtune.core.data.load import load_dataset
    from fedtune.core.models.build import build
    from fedtune.public.factor import moments

    study = parent.study
    if study.public is None or not study.public.path.exists():
        raise ConfigError(
            f"{parent.run.folder}: regmean needs the public text of its study",
            "a [public] table, and its file on this machine",
            "merge on the machine where the study ran, or use another method",
        )
    network = build(_with_saved_factor(study, parent.table))
    text = load_dataset(study.public, study, network.tokenizer, labelled=False)
    adapter = pick_arrays(parent.arrays, network.parameters(), parent.run.folder / "adapter")
    with network.loaded(_select_frozen(parent.arrays), adapter):
        layer_moments = moments(network, text)
    return {
        name.removesuffix(".lora_A.default.weight"): value for name, value in layer_moments.items()
    }


def _with_saved_factor(study: Study, table: LoraTable) -> Study:
    """Return the study with the LoRA table `table`, changed so that A is loaded from a saved
    adapter instead of drawn from the seed."""
    saved = table.model_copy(update={"a_init": "public", "a_digest": None})
    return study.model_copy(update={"lora": saved})


def _select_frozen(arrays: Arrays) -> Arrays:
    return {name: value for name, value in arrays.items() if "lora_A" in name}
