"""Make a site's own model out of a released run, and seal it to the site: `fedtune personalise`.

Guarantee: nothing is sent, and nothing in the run's folder is changed. Of the trained model only
the sealed file is written. The result follows from the site's patients without noise: no ε covers
it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.core.config import Site, Study
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.adapter_files import pick_arrays
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import Arrays
from fedtune.core.models.network import Network
from fedtune.core.objectives._interface import Batch, Objective
from fedtune.evidence.told import digest_of_adapter
from fedtune.homes.opening import open_paying_ledger
from fedtune.officer.personalise.fit import Choice, Fit, Grid, Losses, choose
from fedtune.officer.personalise.records import Own, read_own
from fedtune.runs.personal import describe, personal_file, seal
from fedtune.runs.run import Run, open_run

FOLDS = 5
# If an adapter is trained, each step passes all records through the trained layers, which takes
# long. So fewer ways to fit are tried than for a head, and on one fold only.
ADAPTER_GRID = Grid(pulls=(0.1, 0.001), steps=(1, 2, 4, 8))


@dataclass(frozen=True)
class Personal:
    """The result of `personalise`.

    - file: the sealed model; None if the released model is kept, and no file was written
    - choice: how the models compare on records that a fit did not see, in nats
    - patients, records: the numbers of patients and records that are trained on
    - left_out: reason → number of patients
    - rejected: reason → number of records"""

    file: Path | None
    choice: Choice
    patients: int
    records: int
    left_out: dict[str, int]
    rejected: dict[str, int]


def personalise(run: Run | Path | str, site: Site) -> Personal:
    """Train a finished run's model further on this site's own records, with a pull towards the
    released model, and seal the result to the site's key. The result is kept only if it is better
    than the released model on records that the fit did not see. If it is not better, the result of
    an earlier call is deleted too.

    The records are those of [data], without patients who withdrew or did not consent, and without
    those of [acceptance] and [evaluation]. `predict`, `evaluate`, `generate` and `accept` use the
    result at this site; nothing else opens it.

    run: a run, or the path of its folder or dossier. Returns: the file of the sealed model, if one
    was kept, how it compares with the released one, and the numbers of records.

    >>> import fedtune
    >>> fedtune.personalise(fedtune.Run("runs/none"), fedtune.load_site("no/site.toml"))
    Traceback (most recent call last):
      ...
    fedtune.core.errors.InputError: ...

    Errors: DataError (records that cannot be used, or too few), ModelError, LedgerError,
    InfrastructureError; NeverLeaves (`run` is a personal model)."""
    run = run if isinstance(run, Run) else open_run(run)
    path = personal_file(site, run)
    ledger = open_paying_ledger(site)
    own, choice, arrays = train(run, site, ledger)
    # The entry does not say whether a model is kept, since that is an exact fact about patients.
    acts = AuditLog(ledger.folder, ledger.key)
    acts.add("assess", "personalise", plan=run.study.digest, model=digest_of_adapter(run.folder))
    if arrays is not None:
        about = describe(run, site, ledger, units=own.hashes, chosen=asdict(choice.way))
        seal(path, arrays, about, ledger)
    else:
        path.unlink(missing_ok=True)
    return Personal(
        file=None if arrays is None else path,
        choice=choice,
        patients=len(own.hashes),
        records=len(own.units),
        left_out=dict(own.left_out),
        rejected=dict(own.rejected),
    )


def train(run: Run, site: Site, ledger: Ledger) -> tuple[Own, Choice, Arrays | None]:
    """Choose how to fit, and fit to all of the site's records. Nothing is written.

    run: the run whose model is trained further. site: the site whose [data] is read. ledger: the
    site's ledger, which knows who withdrew.

    Returns: the records, the choice, and the fitted arrays, None if the released model is kept.
    Errors: DataError, ModelError."""
    saved, study = run.adapter(), own_study(run.study)
    network = build(study)
    network.adopt(study, {name: value for name, value in saved.items() if "lora_A" in name})
    released = pick_arrays(saved, network.parameters(), run.place)
    own = read_own(site, study, network, ledger)
    with network.loaded(trainable=released):
        data = CachedDataset(network, own.dataset)
        data.warm()
        losses = _losses(study.objective.resolved, data)
        fit = Fit(network.parameters(), _scales(network), losses)
        folds, grid = own.folds(FOLDS), Grid()
        if not network.pooled:
            folds, grid = folds[:1], ADAPTER_GRID
        choice = choose(fit, folds, own.units, grid)
        arrays = fit.arrays(range(len(own.units)), choice.way) if choice.better else None
    return own, choice, arrays


def own_study(study: Study) -> Study:
    """Return the study with which a site trains the released arrays further: a copy of the run's
    study, whose objective is replaced if it needs class statistics or a teacher. Where the run made
    a head of class statistics, the copy trains that head by gradients. Where the run learned from a
    teacher, the copy learns from the records' own targets. With LoRA, the copy uses the saved A."""
    objective = study.objective.resolved
    changes: dict[str, Any] = {}
    if objective.directions or objective.teacher_spec:
        name = "classify" if objective.record_format == "label" else "causal_lm"
        plain: dict[str, Any] = {"name": name, "options": {}, "basis_digest": None}
        changes["objective"] = study.objective.model_copy(update=plain)
    if study.lora:  # the saved A is loaded, however it was made
        adopted = {"a_init": "public", "a_digest": None, "preconditioner": None}
        changes["lora"] = study.lora.model_copy(update=adopted)
    return study.model_copy(update=changes)


def _scales(network: Network) -> dict[str, float]:
    """Return name → the factor by which a parameter's change is multiplied in a fit (Fit.scales),
    for each parameter of the network. For a head's weights it is 1 / √(hidden size), the inverse
    length of the vectors that the head reads, so that the penalty on the distance from the released
    values (`pull` in Fit.path) holds back a weight as much as a bias. For other parameters it is
    1."""
    length = math.sqrt(network.hidden_size)
    return {n: 1 / length if n == "head.weight" else 1.0 for n in network.parameters()}


def _losses(objective: Objective, data: CachedDataset) -> Losses:
    """Return the function by which a fit computes losses. It takes the numbers of records and
    yields, batch by batch, the numbers and the losses of the batch's records. If only a head is
    trained, each passage is one vector, so all records are joined into one batch beforehand.

    objective: computes the losses. data: the records."""
    network = data.network
    everything = _joined(data) if network.pooled else None

    def losses(rows: Sequence[int]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        batches = data.batches(rows) if everything is None else [_select(everything, rows)]
        for batch in batches:
            yield batch.index.numpy(), objective.losses(network, batch)

    return losses


def _joined(data: CachedDataset) -> Batch:
    """Join all records' vectors in one batch, in the order of the dataset."""
    parts = list(data.batches(range(len(data.dataset.examples))))
    joined = Batch(
        prefix=torch.cat([part.prefix for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        target_ids=torch.cat([part.target_ids for part in parts]),
        label=torch.cat([part.label for part in parts]),
        index=torch.cat([part.index for part in parts]),
    )
    return _select(joined, torch.argsort(joined.index).tolist())


def _select(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return the batch of those records of `batch` whose places in it are `rows`, in the order of
    `rows`."""
    places = torch.tensor(rows, dtype=torch.long)
    passages = len(batch.prefix) // len(batch.index)
    at = (places[:, None] * passages + torch.arange(passages)).flatten().to(batch.prefix.device)
    return replace(
        batch,
        prefix=batch.prefix[at],
        mask=batch.mask[at],
        target_ids=batch.target_ids[at],
        label=batch.label[places.to(batch.label.device)],
        index=batch.index[places],
        count=len(rows),
    )
