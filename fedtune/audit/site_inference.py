"""Site inference: test whether a model's outputs tell which site a record is from, and whose
records the model learnt.

    guessed    each record's site. The attacker knows how training changed the model's outputs on
               the record, and names the site whose other records of this class have the nearest
               mean change
    learnt     how much more the loss fell on a site's records than on all records of their classes

Both are compared with chance: the sites' names are permuted among units that have records of the
same classes, so that information from the class alone does not count (Noreen 1989, chapter 2). ε
protects a patient, so it covers neither.

A guess above chance need not come from training: records of a site may share a style, by which the
outputs of any model tell them apart. So the same guess is made with `references`, models that did
not learn from these sites; only a guess that is better than the references' shows that the model
learnt from the sites' records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtune.core.config import DataFile, EvaluationTable, Study
from fedtune.core.data.records import read_records
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.files.writing import replace
from fedtune.core.models.lora import Arrays
from fedtune.evaluation.evaluator import Evaluator
from fedtune.evaluation.run import evaluator_of, with_columns_of
from fedtune.report.scores import Scores
from fedtune.runs.run import Run

EXCHANGES = 1999
LEAST = 10  # records of a site: with fewer nothing is said
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Guessed:
    """The share of records whose site was guessed, with equal weight for each site.

    - of: the class; "" for all classes
    - chance: the mean share over permutations of the sites' names
    - p: the share of permutations that give at least as high a share (the p-value)"""

    of: str
    records: int
    share: float
    chance: float
    p: float


@dataclass(frozen=True)
class Learnt:
    """How much better the model learnt one site's records.

    - site, records: the site, and the number of its records
    - fall: how much more the loss fell on these records than on all records of their classes (nats)
    - p: the share of permutations of the sites' names with at least as large a value, times the
      number of sites (Bonferroni)"""

    site: str
    records: int
    fall: float
    p: float


@dataclass(frozen=True)
class SiteInference:
    """What a model's outputs reveal about sites.

    - guessed: how well the records' sites are guessed, in all classes together
    - learnt: how much better the model learnt the records of each site
    - by_class: for each class, how well the sites of its records are guessed; each p is multiplied
      by the number of classes
    - references: folder of a run whose model did not learn from these sites -> how well the sites
      are guessed from the outputs of that model"""

    guessed: Guessed
    by_class: tuple[Guessed, ...]
    learnt: tuple[Learnt, ...]
    references: dict[str, Guessed]


@dataclass(frozen=True)
class Asked:
    """The site, the class and the unit of each record, as arrays with one entry per record.

    - names: the sites' names
    - sites: the number of each record's site in `names`
    - classes: each record's class, "" if it has none
    - units: the number of each record's unit; two sites have no unit in common"""

    names: tuple[str, ...]
    sites: Ints
    classes: npt.NDArray[np.str_]
    units: Ints


def attack_sites(
    run: Run,
    records: Mapping[str, DataFile | Path | str],
    *,
    references: Sequence[Run] = (),
    out: Path | str | None = None,
) -> SiteInference:
    """Try to tell, by the outputs of a finished run's model on the records of several sites, which
    site each record is from and whose records the model learnt.

    Each file holds records that are known to be one site's, whether they were trained on or not. If
    the columns name a patient column, a patient's records are one unit. Nothing is charged. The
    result is an exact function of the records, so only this user can read `out`.

    Args:
        run: the finished run whose model is examined.
        records: site's name -> a file with the study's columns.
        references: runs on the same base that did not train on these sites' records. The sites are
            guessed from their outputs too; only if the guess from `run` is better does it show that
            `run` learnt from these records.
        out: a folder for sites.json; None writes nothing.

    >>> from fedtune import Run
    >>> from fedtune.audit.site_inference import attack_sites
    >>> attack_sites(Run("runs/none"), {"north": "n.csv", "south": "s.csv"})
    Traceback (most recent call last):
      ...
    fedtune.core.errors.InputError: ...

    Errors: InputError, such as ConfigError (fewer than two sites), DataError (a site with fewer
    than LEAST records that the model can read) or ModelError; InfrastructureError."""
    given = given_of(run.study, records)
    outputs, asked = _outputs(run, given)
    found = infer(outputs, asked)
    others = {str(one.folder): guess(_outputs(one, given)[0], asked) for one in references}
    found = SiteInference(found.guessed, found.by_class, found.learnt, others)
    if out is not None:
        text = json.dumps(asdict(found), indent=1, sort_keys=True, ensure_ascii=False)
        replace(Path(out) / "sites.json", (text + "\n").encode(), private=True)
    return found


def given_of(study: Study, records: Mapping[str, DataFile | Path | str]) -> dict[str, DataFile]:
    """Return each site's name -> its file, sorted by name. A bare path becomes a file with the
    columns of the study. Errors: ConfigError if there are fewer than two sites."""
    if len(records) < 2:
        raise ConfigError(
            "records of one site only",
            "records of two or more sites",
            "give --records NAME=FILE for each",
        )
    return {
        name: file if isinstance(file, DataFile) else with_columns_of(study, Path(file))
        for name, file in sorted(records.items())
    }


def _outputs(run: Run, given: Mapping[str, DataFile]) -> tuple[Floats, Asked]:
    """Compute how training changed the outputs on each record, (n, 2): the fall of its loss, and
    the change of the model's confidence. Also return the records' sites, classes and units. given:
    each site's name -> its file."""
    changes = list[Floats]()
    readers, asked = read(run, given)
    for evaluator, trained in readers:
        after, before = evaluator.scores(trained), evaluator.untouched
        changes.append(
            np.stack([before.loss - after.loss, _sureness(after) - _sureness(before)], axis=1)
        )
    return np.concatenate(changes), asked


def read(run: Run, given: Mapping[str, DataFile]) -> tuple[list[tuple[Evaluator, Arrays]], Asked]:
    """Read each site's records, and make ready to run the model on them. given: each site's name ->
    its file.

    Returns: for each site, a pair of the evaluator of its records and the run's trained arrays; and
    the site, class and unit of each record, in the same order.
    Errors: ConfigError, DataError, ModelError."""
    study = run.study
    choices = study.evaluation.choices if study.evaluation else ()
    labels = study.objective.labels or tuple(choice.strip() for choice in choices)
    readers = list[tuple[Evaluator, Arrays]]()
    sites = list[int]()
    classes = []
    units = []
    for number, (name, file) in enumerate(given.items()):
        columns = {"path": file.path, "columns": file.columns, "choices": choices}
        metric = "accuracy" if len(labels) > 1 else "loss"
        table = EvaluationTable.model_validate(columns | {"metric": metric})
        evaluator, trained = evaluator_of(run, table)
        if (n := len(evaluator)) < LEAST:
            raise DataError(f"{file.path}: {n} usable records", f"at least {LEAST}")
        readers.append((evaluator, trained))
        sites += [number] * n
        classes += [labels[k] if k >= 0 else "" for k in evaluator.untouched.gold]
        units += [f"{name}\0{unit}" for unit in _units(file, n)]
    asked = Asked(
        tuple(given),
        np.array(sites),
        np.array(classes),
        np.unique(units, return_inverse=True)[1],
    )
    return readers, asked


def _units(file: DataFile, usable: int) -> list[str]:
    """Return the unit of each record: its patient or, without a patient column, the record itself.
    usable: how many of the file's records the model can read.

    Errors: DataError if the file names patients and the model cannot read one of its rows."""
    if not file.columns.patient:
        return [str(n) for n in range(usable)]
    read = read_records(file, unit="patient")[0]
    if len(read) != usable:
        raise DataError(
            f"{file.path}: {len(read) - usable} records cannot be read by this model",
            "only records that the model can read, if they name patients",
            "take the unreadable records out of the file",
        )
    return [record.unit for record in read]


def _sureness(scores: Scores) -> Floats:
    return np.zeros(len(scores.loss)) if scores.confidence is None else scores.confidence


def infer(outputs: Floats, asked: Asked) -> SiteInference:
    """Build the result of an attack from `outputs` (n, d), of which column 0 is the fall of a
    record's loss. The result's field `references` is left empty."""
    classes = [str(name) for name in np.unique(asked.classes)]
    by_class = [
        guess(outputs[asked.classes == name], of_class(asked, name), name) for name in classes
    ]
    seen = [one for one in by_class if one.records]
    adjusted = tuple(
        Guessed(g.of, g.records, g.share, g.chance, min(1.0, len(seen) * g.p)) for g in seen
    )
    return SiteInference(guess(outputs, asked), adjusted, _compare_falls(outputs[:, 0], asked), {})


def of_class(asked: Asked, name: str) -> Asked:
    """Return the entries of the records that are of one class. name: the class."""
    rows = asked.classes == name
    return Asked(asked.names, asked.sites[rows], asked.classes[rows], asked.units[rows])


def guess(outputs: Floats, asked: Asked, of: str = "") -> Guessed:
    """Guess each record's site, and compare the share of correct guesses with chance.

    outputs: (n, d), how training changed the model's outputs on each record. asked: the site, class
    and unit of each record. of: the class that the records are of; "" for all."""
    shares = np.concatenate([_shares(outputs, asked, names) for names in _exchange_names(asked)])
    found, null = float(shares[0]), shares[1:]
    records = int(_counts(asked)[1].sum())
    p = float((1 + (null >= found - 1e-12).sum()) / (1 + len(null)))
    return Guessed(of, records, found, float(null.mean()), p)


def _counts(asked: Asked) -> tuple[list[np.ndarray], np.ndarray]:
    """Find the classes in which sites can be told apart: those of which at least two sites have two
    records or more. Return for each of these classes an array with the indices of its records, and
    one array with the number of records in each class."""
    rows = []
    for name in np.unique(asked.classes):
        here = np.flatnonzero(asked.classes == name)
        held = np.bincount(asked.sites[here], minlength=len(asked.names))
        if (held >= 2).sum() >= 2:  # so that a site's mean can leave out the guessed record
            rows.append(here)
    return rows, np.array([len(here) for here in rows], dtype=int)


def _shares(outputs: Floats, asked: Asked, sites: Ints) -> Floats:
    """Compute the share of records whose site is guessed correctly, with equal weight for each site
    within a class, once for each permutation of the sites' names. Return one share per permutation.

    - outputs: (n, d), how training changed the model's outputs on each record
    - asked: the site, class and unit of each record
    - sites: (permutations, n), the number of each record's site in each permutation"""
    rows, counts = _counts(asked)
    if not rows:
        return np.zeros(len(sites))
    total = np.zeros(len(sites))
    for here in rows:
        total += len(here) * _class_share(outputs[here], sites[:, here], len(asked.names))
    return np.asarray(total / counts.sum())


def _class_share(values: Floats, sites: Ints, number: int) -> Floats:
    """Compute the share of records of one class whose site is guessed correctly, with equal weight
    for each site, once for each permutation of the sites' names. Return one share per permutation.

    - values: (m, d), how training changed the model's outputs on each record of the class
    - sites: (permutations, m), the number of each record's site in each permutation
    - number: how many sites there are"""
    spread = values.std(axis=0)
    values = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    own = np.eye(number)[sites]  # (exchanges, m, sites)
    held = own.sum(axis=1)  # (exchanges, sites)
    sums = np.einsum("ems,md->esd", own, values)
    # Each site's mean without the record itself where it is the site's own.
    others = held[:, None, :] - own
    means = (sums[:, None] - own[..., None] * values[None, :, None, :]) / np.maximum(
        others[..., None], 1
    )
    distance = ((values[None, :, None, :] - means) ** 2).sum(axis=-1)
    distance = np.where(others > 0, distance, np.inf)
    right = np.take_along_axis(own, distance.argmin(axis=-1)[..., None], axis=-1)[..., 0]
    hits = np.einsum("em,ems->es", right, own)
    present = held > 0
    return np.asarray((hits / np.maximum(held, 1)).sum(axis=1) / present.sum(axis=1))


def _compare_falls(falls: Floats, asked: Asked) -> tuple[Learnt, ...]:
    """Compare how much training lowered the loss on each site's records with how much it lowered
    the loss on all records of their classes. Return an entry for each site. falls: (n,), by how
    much training lowered the loss on each record."""
    found, p = compare(falls, asked)
    held = np.bincount(asked.sites, minlength=len(asked.names))
    return tuple(
        Learnt(name, int(held[n]), float(found[n]), min(1.0, len(asked.names) * float(p[n])))
        for n, name in enumerate(asked.names)
    )


def compare(values: Floats, asked: Asked) -> tuple[Floats, Floats]:
    """Compare each site's mean of `values` (n,) with the mean over all records of its classes.
    Return two arrays (sites,): the differences, and the share of permutations of the sites' names
    that give at least as large a difference. asked: the site, class and unit of each record."""
    centred = values.copy()
    for name in np.unique(asked.classes):
        rows = asked.classes == name
        centred[rows] -= values[rows].mean()
    means = []
    for names in _exchange_names(asked):
        own = np.eye(len(asked.names))[names]
        means.append(np.einsum("ems,m->es", own, centred) / np.maximum(own.sum(axis=1), 1))
    stacked = np.concatenate(means)
    found, null = stacked[0], stacked[1:]
    return found, (1 + (null >= found - 1e-12).sum(axis=0)) / (1 + len(null))


def _exchange_names(asked: Asked, block: int = 100) -> Iterator[Ints]:
    """Yield permutations of the sites' names, as arrays (rows, n) with the number of each record's
    site. The first array has one row, the true numbers. The next arrays have up to `block` rows
    each and EXCHANGES rows in all, drawn from a fixed seed. A unit's records keep one site, and
    only units whose records are of the same classes exchange theirs."""
    yield asked.sites[None]
    first = np.unique(asked.units, return_index=True)[1]
    unit = np.searchsorted(asked.units[first], asked.units)
    made = [sorted(asked.classes[asked.units == asked.units[at]].tolist()) for at in first]
    strata: dict[str, list[int]] = {}
    for number, classes in enumerate(made):
        strata.setdefault(json.dumps(classes), []).append(number)
    random, of_unit = np.random.default_rng(0), asked.sites[first]
    for start in range(0, EXCHANGES, block):
        size = min(block, EXCHANGES - start)
        names = np.tile(of_unit, (size, 1))
        for numbers in map(np.array, strata.values()):
            names[:, numbers] = random.permuted(names[:, numbers], axis=1)
        yield names[:, unit]


def lines(found: SiteInference) -> list[str]:
    """Describe in lines of text what the model's outputs reveal about the sites."""

    def format_guess(one: Guessed) -> str:
        return f"{one.share:.0%} where chance is {one.chance:.0%} (p = {one.p:.3g})"

    said = [
        f"the site of {found.guessed.records} records is guessed: {format_guess(found.guessed)}"
    ]
    said += [f"  of class {one.of}: {format_guess(one)}" for one in found.by_class if one.of]
    said += [f"  by {folder}, which did not learn from them: {format_guess(one)}"
             for folder, one in found.references.items()]  # fmt: skip
    for site in found.learnt:
        said.append(
            f"{site.site}: the loss fell by {site.fall:+.3g} more than on all given records of the "
            f"same classes (p = {site.p:.3g})"
        )
    return [*said, "ε of a patient does not cover which site a model learnt from"]
