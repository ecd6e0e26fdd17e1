"""Attack a finished run at a site, with the site's own records as members; the result stays at
the site."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.audit.membership import Membership, Scores, membership
from fedtune.audit.picture import curves
from fedtune.audit.secret import record_losses
from fedtune.core import progress
from fedtune.core.config import Site, SiteData
from fedtune.core.data.dataset import Dataset
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.files.writing import replace
from fedtune.core.models.adapter_files import pick_arrays
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.vault.reading import read_for_training
from fedtune.homes.opening import find_ledger
from fedtune.runs.run import Run

LEAST = 10  # the smallest number of members, and of held-out units; intervals need so many


@dataclass(frozen=True)
class SiteAttack:
    """The result of an attack at a site.

    - membership: how well the site's units can be told from held-out ones
    - epsilon: the run's ε; None without privacy
    - references: the names of the models with which the run's losses were compared"""

    study: str
    site: str
    unit: str
    references: tuple[str, ...]
    epsilon: float | None
    delta: float
    membership: Membership


def attack_site(
    run: Run,
    site: Site,
    held_out: Path | str | None = None,
    *,
    references: Sequence[Run] = (),
    out: Path | str | None = None,
) -> SiteAttack:
    """Measure how well this site's units can be told from held-out ones by the change of their loss
    through training.

    A unit's score says by how much the run's mean loss on the unit's records is below the mean loss
    of the references. The references are the untrained base and, if given, other runs of the same
    adapter that did not train on these records. The result is computed from private records without
    noise, so it stays at the site: only this user can read the files in `out`.

    Args:
        run: the finished run that is attacked.
        site: the site, whose [data] holds the members: the records that the run trained on.
        held_out: a file of similar records on which no site trained, with the same columns; by
            default the site's [evaluation].
        references: the other runs; () compares with the base alone.
        out: a folder for attack.json and attack.png; None writes nothing.

    >>> import fedtune
    >>> fedtune.attack_site(fedtune.Run("runs/none"), fedtune.load_site("no/site.toml"))
    Traceback (most recent call last):
      ...
    fedtune.core.errors.InputError: ...

    Errors: ConfigError (no held-out records are named, or a reference has another adapter),
    DataError (fewer than LEAST members or held-out units), ModelError."""
    study = run.study
    network = build(study)
    inside = _read(site, site.data, network, run)
    outside = _read(site, _held_out(site, held_out), network, run)
    for dataset, where in ((inside, "this site's records"), (outside, "the held-out records")):
        if dataset.n_units < LEAST:
            raise DataError(
                f"{where}: {dataset.n_units} usable {study.unit}s",
                f"at least {LEAST} units",
                "give more held-out records with --held-out"
                if dataset is outside
                else "attack at a site with more records",
            )
    told = [_scores(network, data, run, references) for data in (inside, outside)]
    claim = run.epsilon.get(site.site.name, max(run.epsilon.values(), default=None))
    privacy = study.privacy
    delta = 0.0 if isinstance(privacy, str) else privacy.delta
    result = SiteAttack(
        study=study.study.name,
        site=site.site.name,
        unit=study.unit,
        references=("the base", *(str(other.folder) for other in references)),
        epsilon=claim,
        delta=delta,
        membership=membership(told[0], told[1], claim, delta),
    )
    if out is not None:
        _save(result, Path(out))
    return result


def _held_out(site: Site, path: Path | str | None) -> SiteData:
    """Return the settings for reading the held-out records. If `path` is given, these are the
    site's [data] with `path` as the file; otherwise they are its [evaluation]. Errors: ConfigError
    if there is neither."""
    if path is not None:
        changes: dict[str, Any] = {"path": Path(path), "url": None, "name": "held-out"}
        if site.data.url:  # the keys of a database do not apply to a file
            changes |= {"source": None, "options": {}}
        return site.data.model_copy(update=changes)
    if site.evaluation is None:
        raise ConfigError(
            "no held-out records",
            "records that no site trained on, to compare with",
            "give --held-out FILE, or [evaluation] in site.toml",
        )
    return site.evaluation


def _read(site: Site, data: SiteData, network: Network, run: Run) -> Dataset:
    """Read the members or the held-out records, as the run's study reads records for training,
    without patients who withdrew.

    - site: the site, whose ledger, if there is one, knows who withdrew
    - data: the site's [data], or the settings of the held-out records
    - network: the study's network, whose tokenizer and file reader are used
    - run: the run whose study says how records are read"""
    ledger = find_ledger(site.home)
    return read_for_training(data, run.study, network.tokenizer, network.reader, ledger)


def _scores(network: Network, data: Dataset, run: Run, references: Sequence[Run]) -> Scores:
    """Return, as an array (units, 1), by how much the run's mean loss on each unit's records is
    below the mean loss of the references.

    - network: the network of the run's study
    - data: the units that are scored
    - run: the run that is attacked
    - references: further runs that did not train on these units; the base is always a reference"""
    cached = CachedDataset(network, data)

    def losses(of: Run | None) -> Scores:
        saved = run.adapter() if of is None else of.adapter()
        folder = (of or run).folder / "adapter"
        frozen = pick_arrays(saved, network.frozen_factor(), folder)
        trained = network.zero() if of is None else pick_arrays(saved, network.trainable(), folder)
        with network.loaded(frozen, trained):
            return np.asarray(record_losses(cached, run.study))

    others = []
    for number, reference in enumerate((None, *references), 1):
        others.append(losses(reference))
        progress.report("losses of the references", number, 1 + len(references))
    fall = np.mean(others, axis=0) - losses(run)
    units = np.array([example.unit for example in data.examples])
    return (np.bincount(units, fall) / np.bincount(units))[:, None]


def _save(result: SiteAttack, out: Path) -> None:
    text = json.dumps(asdict(result), indent=1, sort_keys=True, ensure_ascii=False)
    replace(out / "attack.json", (text + "\n").encode(), private=True)
    picture = curves({"this site's units": result.membership}, result.epsilon, result.delta)
    replace(out / "attack.png", picture, private=True)
