"""Test whether the updates that a coordinator receives tell whose records they were made from.

A run keeps no update, only digests of what the sites signed. So the run's study is trained again,
by the code of a site's round, on records that the attacker knows to be a site's. The units in each
site's file are divided at random into two halves. One half is trained on, and the attacker compares
the updates with the other half.

    received   what the attacker has: each site's noised update of every round or, with secure
               aggregation, only the sum of the sites' updates
    along      what the attacker computes for each site: the mean cosine, over all rounds, between
               the updates and the steps of the site's records, minus the mean cosine for all
               sites' records of the same classes

Significance is tested by permuting the sites' names among the compared units of the same classes,
as in `site_inference`. ε protects a patient, so it covers none of this."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedtune.accounting.update_noise import gain_of_noise
from fedtune.audit.attack import begin_again, begin_strategy, noise_of_step
from fedtune.audit.site_inference import LEAST, Asked, Floats, compare, given_of, of_class, read
from fedtune.core import progress
from fedtune.core.config import DataFile, Study
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.dp import clip
from fedtune.core.dp.non_private import non_private_plan
from fedtune.core.dp.plan import DpPlan, StepPlan, plan_for_site
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.files.writing import replace as write_file
from fedtune.core.models import preconditioner
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import Arrays
from fedtune.core.training.local_round import local_round
from fedtune.core.training.selftest import MemoryLog
from fedtune.core.training.unit_gradients import UnitGradientEngine
from fedtune.public.start import Start
from fedtune.runs.run import Run

SUM = "the sum"  # stands for the sender if only the sum of all sites' updates is opened


@dataclass(frozen=True)
class Along:
    """How far one sender's updates point along the records of one site.

    - site: the site whose records are compared
    - records: the number of these records
    - of: the class of these records; "" for all classes
    - cosine: the mean cosine of the updates with the steps of these records, minus the mean cosine
      with all sites' records of the same classes
    - p: the p-value by a permutation of the sites' names, times the number of such comparisons for
      these updates (Bonferroni)"""

    site: str
    of: str
    records: int
    cosine: float
    p: float


@dataclass(frozen=True)
class Traced:
    """What the updates of one sender reveal about whose records they were made from.

    - updates: the name of the site that sent them; SUM if only the sum of all sites' updates is
      opened
    - sites: for each site, how far the updates point along its records of all classes
    - by_class: for each class in which sites can be compared, and each of its sites, how far the
      updates point along the site's records of this class"""

    updates: str
    sites: tuple[Along, ...]
    by_class: tuple[Along, ...]

    @property
    def named(self) -> Along:
        """The site, and perhaps the class, that the attack names as the updates' source: the entry
        with the smallest p; of several, the one with the largest cosine."""
        return min((*self.sites, *self.by_class), key=lambda one: (one.p, -one.cosine))


@dataclass(frozen=True)
class Party:
    """A sender of updates: the records on which it trains, the plan of its steps, and the weight of
    its updates in the strategy."""

    data: CachedDataset
    plan: StepPlan
    weight: float


def attack_received(
    run: Run, records: Mapping[str, DataFile | Path | str], *, out: Path | str | None = None
) -> tuple[Traced, ...]:
    """Try to tell which site's records an update was made from, using only what the coordinator of
    a finished run's study receives, and records that are known to be a site's.

    Each file's units are divided at random into halves. One half is trained on, from the study's
    starting point, as at a site that declares this number of units; the other half is compared with
    the updates. Nothing is charged, since no update leaves this machine. The result is an exact
    function of the records, so only this user can read `out`.

    Args:
        run: a finished run, whose study is trained again.
        records: site's name -> a file with the study's columns.
        out: a folder for received.json; None writes nothing.

    Returns: how far each site's updates point along each site's records; of a study with secure
    aggregation, how far the sum of all updates does.

    >>> from fedtune import Run
    >>> from fedtune.audit.received import attack_received
    >>> attack_received(Run("runs/none"), {"north": "n.csv", "south": "s.csv"})
    Traceback (most recent call last):
      ...
    fedtune.core.errors.InputError: ...

    Errors: InputError, such as ConfigError (fewer than two sites, or fewer than share the plan's
    noise), DataError (a half has fewer than LEAST records) or ModelError; InfrastructureError."""
    given, objective = given_of(run.study, records), run.study.objective.resolved
    if objective.teacher_spec or objective.record_format == "unpaired_preference":
        raise ConfigError(
            f"objective {run.study.objective.name} learns from a teacher, or from answers that are "
            "each marked good or bad; this attack does not cover it",
            "an objective that learns from texts, answers, labels or pairs",
        )
    shared, least = run.study.secure_aggregation, run.study.strategy.min_sites
    if shared and len(given) < least:
        raise ConfigError(
            f"records of {len(given)} sites, and the noise is shared by {least}",
            f"records of {least} sites or more",
            "give --records NAME=FILE for each",
        )
    readers, asked = read(run, given)
    examples = [example for evaluator, _ in readers for example in evaluator.examples]
    trains = _halve(asked)
    for number, name in enumerate(given):
        here = (asked.sites == number) & ~trains
        if here.sum() < LEAST:
            raise DataError(
                f"{given[name].path}: {here.sum()} records are left to compare with the updates",
                f"at least {LEAST}, in the half of the units that is not trained on",
            )
    network = build(run.study)
    with network.loaded(network.frozen_factor() | network.preconditioner):  # restored afterwards
        begun = begin_again(run.study)
        data = [
            CachedDataset(network, _of_units(examples, asked, trains & (asked.sites == number)))
            for number in range(len(given))
        ]
        compared = np.flatnonzero(~trains)
        candidates = CachedDataset(network, _each_a_unit([examples[row] for row in compared]))
        cosines = compare_received(begun, _parties(begun.study, list(given), data), candidates)
    left = Asked(asked.names, asked.sites[compared], asked.classes[compared], asked.units[compared])
    found = tuple(trace(name, values, left) for name, values in cosines.items())
    if out is not None:
        text = json.dumps([asdict(one) for one in found], indent=1, ensure_ascii=False)
        write_file(Path(out) / "received.json", (text + "\n").encode(), private=True)
    return found


def _halve(asked: Asked) -> npt.NDArray[np.bool_]:
    """Draw half of each site's units, from a fixed seed, to train on. Return a mask of all records
    that is True for the records of these units. asked: the site and the unit of each record."""
    random, trains = np.random.default_rng(0), np.zeros(len(asked.sites), dtype=bool)
    for number in range(len(asked.names)):
        units = np.unique(asked.units[asked.sites == number])
        trains |= np.isin(asked.units, random.permutation(units)[: len(units) // 2])
    return trains


def _of_units(examples: Sequence[Example], asked: Asked, rows: npt.NDArray[np.bool_]) -> Dataset:
    """Build the training set of the records that the mask `rows` marks; the records of a unit stand
    together in it. examples, asked: all sites' records, and their units in the same order."""
    here = np.flatnonzero(rows)
    here = here[np.argsort(asked.units[here], kind="stable")]
    units, numbers = np.unique(asked.units[here], return_inverse=True)
    own = [replace(examples[int(r)], unit=int(n)) for r, n in zip(here, numbers, strict=True)]
    return Dataset(own, len(units), Counter())


def _each_a_unit(examples: Sequence[Example]) -> Dataset:
    own = [replace(example, unit=number) for number, example in enumerate(examples)]
    return Dataset(own, len(own), Counter())


def _parties(study: Study, names: Sequence[str], data: Sequence[CachedDataset]) -> dict[str, Party]:
    """Build the senders of updates, by name: the sites or, if only the sum of their updates is
    opened, one sender called SUM. SUM has all sites' records and their joint noise, and its update
    is the optimiser's step that the coordinator takes on the opened sum.

    names, data: the sites, and the records on which each trains, in the same order."""
    if study.secure_aggregation:
        whole = join([one.dataset for one in data])
        plan = joint_plan(study, whole.n_units, len(data))
        return {SUM: Party(CachedDataset(data[0].network, whole), plan, 1.0)}
    weighted = study.strategy.weights == "declared"
    return {
        name: Party(
            one,
            _plan(study, one.dataset.n_units),
            float(one.dataset.n_units if weighted else 1),
        )
        for name, one in zip(names, data, strict=True)
    }


def _plan(study: Study, units: int) -> StepPlan:
    return plan_for_site(study, units) if study.private else non_private_plan(study, units)


def join(parts: Sequence[Dataset]) -> Dataset:
    """Put several sites' units into one dataset."""
    examples, units = list[Example](), 0
    for part in parts:
        examples += [replace(example, unit=units + example.unit) for example in part.examples]
        units += part.n_units
    return Dataset(examples, units, Counter())


def joint_plan(study: Study, units: int, sites: int) -> StepPlan:
    """Return the plan of one site whose update is like the sum of `sites` sites' updates: it has
    all their units, and adds the noise that all of them add. units: the number of units of all
    these sites together. Without privacy it adds no noise."""
    if not study.private:
        return non_private_plan(study, units)
    plan = plan_for_site(study, units)
    noise = plan.own_noise * math.sqrt(sites)
    return replace(plan, noise_multiplier=noise, sites=1, colluding=0)


def compare_received(
    begun: Start, parties: Mapping[str, Party], candidates: CachedDataset
) -> dict[str, Floats]:
    """Train the study on these parties' records, and compare each update that the coordinator
    receives with the update that each candidate alone would cause. Return a dict: party's name ->
    each candidate's mean cosine over all rounds, (n,).

    - begun: the study's starting point
    - parties: name -> the Party that sends the updates
    - candidates: n records, each a unit of its own, cached with the same model (`network`) as the
      parties' records; the model's arrays are restored afterwards"""
    study, network = begun.study, candidates.network
    adapter = begun.adapter
    server = begin_strategy(begun)
    log = MemoryLog()
    rounds = min(_rounds(study, party) for party in parties.values())
    totals = np.zeros((len(parties), len(candidates.dataset.examples)))
    with network.loaded(trainable=adapter):
        for round_ in range(1, rounds + 1):
            network.load_trainable(adapter)
            updates = [
                local_round(study, party.data, party.plan, log, round_, adapter)
                for party in parties.values()
            ]
            totals += cosines(study, candidates, updates)
            for update, party in zip(updates, parties.values(), strict=True):
                server.add(update, party.weight)
            units, noise = _noise_of_mean(parties.values())
            server.describe_round(units, noise * gain_of_noise(study, round_))
            adapter = preconditioner.step_adapter(server.apply, adapter, begun.frozen)
            progress.report("rounds", round_, rounds)
    return dict(zip(parties, totals / rounds, strict=True))


def _noise_of_mean(parties: Collection[Party]) -> tuple[int, float]:
    """Return the number of units of all senders together, and the standard deviation of the noise
    in each number of their weighted mean gradient."""
    noise = math.hypot(*(noise_of_step(party.plan) * party.weight for party in parties))
    units = sum(party.data.dataset.n_units for party in parties)
    return units, noise / sum(party.weight for party in parties)


def _rounds(study: Study, party: Party) -> int:
    """Return the study's number of rounds or, for a study without a last round, the number that a
    patient's budget pays for at this sender."""
    plan = party.plan
    return plan.rounds if isinstance(plan, DpPlan) else study.training.rounds or 0


def cosines(study: Study, candidates: CachedDataset, updates: Sequence[Arrays]) -> Floats:
    """Return the inner product of each update's direction with each record's own step, as an array
    (updates, n). A record's step is minus its gradient at the loaded adapter, clipped and divided
    by C; without a [clipping] table it is minus the gradient as it is."""
    kind = study.training.engine
    engine = UnitGradientEngine(candidates, study.objective.resolved, "record", kind)
    names = list(candidates.network.update_parameters())
    flat = [
        torch.cat([torch.from_numpy(each[name]).flatten() for name in names]) for each in updates
    ]
    toward = torch.nn.functional.normalize(torch.stack(flat).double(), eps=1e-300)
    found, table = np.zeros((len(updates), engine.n_rows)), study.clipping
    for chunk in engine(list(range(engine.n_rows))):
        rows, largest = chunk.flat().cpu(), 1.0
        if table is not None:
            largest = table.max_grad_norm
            rows = clip.clip(rows, largest, table.mode, table.gamma)
        found[:, list(chunk.rows)] = -(toward @ rows.double().T).numpy() / largest
        chunk.wipe()
    return found


def trace(updates: str, values: Floats, asked: Asked) -> Traced:
    """Test which site's records these updates were made from, by the mean cosines of the records
    with the updates, in all classes together and in each.

    updates: the name of the site that sent them; SUM for the sum of all sites' updates. values:
    (n,), each compared record's mean cosine with these updates. asked: the site, class and unit of
    these records."""
    classes = [str(name) for name in np.unique(asked.classes)]
    parts = {name: asked.classes == name for name in classes} if len(classes) > 1 else {}
    parts = {name: rows for name, rows in parts.items() if len(np.unique(asked.sites[rows])) > 1}
    by_class = [
        along
        for name, rows in parts.items()
        for along in _along(values[rows], of_class(asked, name), name, 1 + len(parts))
    ]
    return Traced(updates, tuple(_along(values, asked, "", 1 + len(parts))), tuple(by_class))


def _along(values: Floats, asked: Asked, of: str, parts: int) -> list[Along]:
    """Test for each site whether the updates point more along its records than along the records of
    all sites. Return an `Along` for each site that has records among those compared.

    - values: (n,), the mean cosine of each of these records with the updates
    - asked: the site, class and unit of these records
    - of: the class of these records; "" for all classes
    - parts: the number of comparisons with these updates: one of all classes and, if there are
      several classes, one of each that two sites or more have. A p-value is multiplied by this
      number and by the number of sites compared (Bonferroni)."""
    means, p = compare(values, asked)
    held = np.bincount(asked.sites, minlength=len(asked.names))
    there = np.flatnonzero(held)
    return [
        Along(
            asked.names[n], of, int(held[n]), float(means[n]),
            min(1.0, len(there) * parts * float(p[n])),
        )
        for n in there
    ]  # fmt: skip


def lines(found: Sequence[Traced]) -> list[str]:
    """Describe in lines of text what the updates reveal about the sites."""
    said = []
    for one in found:
        named = one.named
        which = f"{named.site}'s records" + (f" of class {named.of}" if named.of else "")
        whose = "the sum of all updates points" if one.updates == SUM else (
            f"{one.updates}'s updates point"
        )  # fmt: skip
        said.append(
            f"{whose} most along {which} (p = {named.p:.3g})"
            if named.p < 0.05
            else f"{whose} along no site's records more than chance allows (p = {named.p:.3g})"
        )
    return [*said, "ε of a patient does not cover which site's records an update was made from"]
