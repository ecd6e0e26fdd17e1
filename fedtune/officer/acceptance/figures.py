"""Build every figure of an acceptance (a site's decision about a finished model) as JSON values.
NaN and infinities become None."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from fedtune.core.config import AcceptanceTable
from fedtune.officer.acceptance.intervals import RESAMPLES, SEED, Difference, Measured, Sample
from fedtune.officer.acceptance.judgement import ALARMS, Judgement, judge
from fedtune.officer.acceptance.measures import BINS, bins_of, measures_of
from fedtune.officer.acceptance.models import MODEL, START, Scored
from fedtune.officer.acceptance.records import HeldOut
from fedtune.report.scores import Scores

WORST = 20  # the number of worst errors that are listed


def figures_of(table: AcceptanceTable, scored: Scored) -> dict[str, Any]:
    """Judge the model, and return the content of figures.json, from which the page is made.

    - table: the site's [acceptance], with the rules
    - scored: the scores of the judged model and of those with which it is compared

    Errors: ConfigError if a rule names a figure that these records do not have."""
    held_out, scores = scored.held_out, scored.scores[MODEL]
    start = scored.scores[START] if START in scored.scores else scored.not_scored[START]
    judgement = judge(table, scores, held_out.units, held_out.groups, scored.labels, start)
    tested = [one for one in judgement.compared if one.found is not None]
    figures: dict[str, Any] = {
        "decision": judgement.decision,
        "judged": [asdict(one) for one in judgement.judged],
        "unit": "patient" if table.columns.patient else "record",
        "patients": held_out.patients,
        "records": len(held_out.units),
        "cut": scored.cut,
        "left_out": dict(held_out.left_out),
        "rejected": dict(held_out.rejected),
        "compared_by": held_out.compared_by,
        "training_read": held_out.training_read,
        "known_since": held_out.known_since,
        "least_group": table.least_group,
        "models": _models(scored, judgement),
        "not_scored": scored.not_scored,
        "compared": [asdict(one) for one in judgement.compared],
        "comparisons": len(tested),
        "level": judgement.level,
        "alarms": ALARMS,
        "different": judgement.different,
        "resamples": RESAMPLES,
        "seed": SEED,
        "worst": list_worst(scores, held_out, scored.labels),
    }
    if scores.confidence is not None:
        figures["reliability"] = _reliability(scores)
    plain: dict[str, Any] = _plain(figures)
    return plain


def _models(scored: Scored, judgement: Judgement) -> dict[str, dict[str, Any]]:
    """Return model → measure → a dict with the measure's figure and interval. For every model
    except the judged one, this dict also has "change", which says by how much the judged model's
    figure is higher, and "change_interval". Both models' figures are computed on the same resamples
    of patients.

    scored: the scores of all models. judgement: the judgement of the judged model, whose figures
    are taken from it."""
    units = scored.held_out.units
    ours = Sample(scored.scores[MODEL], units)
    found: dict[str, dict[str, Any]] = {}
    for name, scores in scored.scores.items():
        sample, rows = Sample(scores, units), {}
        for measure in measures_of(scores, scored.labels).values():
            if name == MODEL:
                higher = {"higher_is_better": measure.higher_is_better}
                rows[measure.name] = judgement.overall[measure.name]._asdict() | higher
                continue
            told = sample.of_measure(measure)
            change = ours.resample(measure) - sample.resample(measure)
            if np.isnan(change).all():
                bounds = [math.nan, math.nan]
            else:
                bounds = [float(bound) for bound in np.nanquantile(change, (0.025, 0.975))]
            better_by = judgement.overall[measure.name].figure - told.figure
            changed = {"change": better_by, "change_interval": bounds}
            rows[measure.name] = told._asdict() | changed
        found[name] = rows
    return found


def list_worst(scores: Scores, held_out: HeldOut, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """List the worst errors, at most WORST: if the records have classes, the wrong predictions with
    the highest confidence; else the records with the highest loss. The result has a dict for each
    record, with the record's file, row and loss and, if there are classes, with the true class, the
    predicted class and the predicted class's probability.

    - scores: the judged model's scores
    - held_out: the records
    - labels: the classes, in the order of their indices"""
    if scores.confidence is not None:
        wrong = np.flatnonzero(scores.chosen != scores.gold)
        order = wrong[np.argsort(-scores.confidence[wrong], kind="stable")]
    else:
        order = np.argsort(-scores.loss, kind="stable")
    listed = []
    for index in order[:WORST].tolist():
        place = held_out.places[index]
        row: dict[str, Any] = {
            "file": place.file if place else "",
            "row": place.row if place else 0,
        }
        if scores.confidence is not None:
            row |= {
                "is": labels[int(scores.gold[index])],
                "taken for": labels[int(scores.chosen[index])],
                "probability": float(scores.confidence[index]),
            }
        listed.append(row | {"loss": float(scores.loss[index])})
    return listed


def _reliability(scores: Scores) -> list[dict[str, float]]:
    """Return a dict for each bin of probability that has records: its edges, number of records,
    mean probability and share of correct predictions. scores: the judged model's scores, with the
    probability of each chosen class."""
    cells = bins_of(scores).sum(axis=0)
    return [
        {
            "from": index / BINS,
            "to": (index + 1) / BINS,
            "records": count,
            "probability": said / count,
            "right": right / count,
        }
        for index, (count, said, right) in enumerate(cells.tolist())
        if count
    ]


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: lists for tuples, None for NaN and infinities."""
    if isinstance(value, Measured | Difference):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
