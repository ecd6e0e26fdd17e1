"""Build a run's report from its progress. Every ε comes from the sites' step logs."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

import fedtune
from fedtune.core.config import PrivacyTable, noise_shares
from fedtune.core.dp.shared_noise import joint_sigma
from fedtune.core.errors import ConfigError
from fedtune.core.models.rank_slice import rank_slice
from fedtune.core.progress import stage
from fedtune.core.strategy import STRATEGIES
from fedtune.core.wire.arrays import Arrays
from fedtune.report.claim import RELATION
from fedtune.report.gain import TRAINED
from fedtune.server.admission import Roster
from fedtune.server.parts import Dependencies, Measures
from fedtune.server.provenance import describe_provenance
from fedtune.server.store import Progress
from fedtune.server.teacher import with_teacher
from fedtune.strategies._posterior import ClassFigures

WARNING = 'privacy = "off": nothing was clipped for a guarantee and no noise was added'


def epsilons(progress: Progress, parts: Dependencies) -> dict[str, float]:
    """Compute what each site's training has cost so far, from the steps that the site logged.
    Return site -> ε at the study's δ; {} if privacy is off.

    For a continuous study this is the ε of a unit that took part in every round. It is at most the
    plan's ε, since a site leaves out every unit that has spent this much. The site's own ledger may
    show less."""
    privacy = progress.study.privacy
    if isinstance(privacy, str):
        return {}
    shares = noise_shares(progress.study)
    by_site = {
        name: _epsilon(events, parts, privacy, shares)
        for name, events in sorted(progress.events.items())
    }
    if progress.study.continuous and privacy.epsilon is not None:
        by_site = {name: min(spent, privacy.epsilon) for name, spent in by_site.items()}
    return by_site


def describe_plan(progress: Progress, roster: Roster, parts: Dependencies) -> dict[str, Any]:
    """Describe a study before its rounds, as the fields of an event. Returns "study" (its name),
    "participants" (the sites that take part) and "planned" (site -> the largest ε that the study
    can cost it, at the study's δ). For a continuous study that is the ε of one unit over all rounds
    in which it takes part."""
    study = progress.study
    by_site = dict[str, float]()
    names = roster.list_willing()
    privacy, steps = study.privacy, study.training.local_steps
    if isinstance(privacy, PrivacyTable) and privacy.epsilon is not None:
        by_site = dict.fromkeys(names, privacy.epsilon)
    elif isinstance(privacy, PrivacyTable):
        of_size: dict[int, float] = {}
        for size in {progress.sizes[name] for name in names}:
            with suppress(ConfigError):  # no mechanism fits this size; its updates will be dropped
                cost, k = parts.budget(study, size), study.records_per_draw
                run = (cost.noise_multiplier, cost.sampling_rate, cost.rounds * steps, k)
                of_size[size] = parts.epsilon([run], privacy.delta)
        sizes = {name: progress.sizes[name] for name in names}
        by_site = {name: of_size[size] for name, size in sizes.items() if size in of_size}
    return {"study": study.study.name, "participants": names, "planned": by_site}


def _epsilon(
    events: list[dict[str, Any]], parts: Dependencies, privacy: PrivacyTable, shares: int = 1
) -> float:
    """Compute ε of a site's steps, at the study's δ.

    - events: the site's step log
    - parts: the run's functions, of which `epsilon` computes ε
    - privacy: the plan's table [privacy], which gives δ
    - shares: the number of sites whose noise adds up in the opened sum; with 1 only the site's own
      noise counts"""
    steps = [(joint_sigma(e["sigma"], shares), e["q"], e["steps"], e["records"]) for e in events]
    return parts.epsilon(steps, privacy.delta)


def report(progress: Progress, parts: Dependencies) -> dict[str, Any]:
    """Build the content of report.json from the run's state `progress`, except the figures for
    which adapters must be measured again. parts: the run's functions and settings."""
    study, history = progress.study, progress.history
    keys = (
        *("round", "participants", "missing", "late", "epsilon", "private_quality"),
        *("bytes_up", "bytes_down", "seconds", "ended"),
    )
    private = isinstance(study.privacy, PrivacyTable)
    extra = {"lora_ranks": _ranks(progress), "weights": _describe_caps(progress)}
    declared, free_query = collect_declarations(history)
    extra |= statements(declared, free_query, [*declared])
    body: dict[str, Any] = {key: by_site for key, by_site in extra.items() if by_site} | {
        "fedtune": fedtune.__version__,
        "study": study.study.name,
        "plan_digest": study.digest,
        "private": private,
        "privacy": _privacy(progress, parts) if private else {"mode": "off", "warning": WARNING},
        "quality": _quality(progress),
        "base": {
            "name": study.base.model,
            "digest": study.base.digest,
            "licence": parts.licence(study),
            "dtype": study.base.dtype,
        },
        "objective": {"name": study.objective.name, **study.objective.options},
        "adapter": _adapter(progress) | {"engine": parts.engine(study)},
        "wire": study.wire.model_dump(mode="json"),
        "sites": dict(sorted(progress.admission.items())),
        "absences": absences(history),
        "rounds": [{key: entry[key] for key in keys if key in entry} for entry in history],
        **_held_out(history),
        **describe_provenance(progress),
    }
    teacher = parts.teacher(study)
    return with_teacher(body, teacher) if teacher else body


def _held_out(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the report's entry "held_out": the table of answers to the newest query that a site
    answered, and this query's "round". Return {} if no site ever answered."""
    for entry in reversed(history):
        if table := entry.get("private_quality", {}).get("table"):
            return {"held_out": {"round": entry["round"], **table}}
    return {}


def lora_ranks(history: list[dict[str, Any]]) -> dict[str, int]:
    """Return site -> the rank that it trains, from the saved rounds; {} if the plan leaves sites no
    choice of rank."""
    return {name: rank for entry in history for name, rank in entry.get("lora_ranks", {}).items()}


def statements(declared: dict[str, str], free_query: set[str], names: list[str]) -> dict[str, Any]:
    """Return what the sites `names` state about their data, in the form that a round's entry in the
    history has. The entries are "declared" (site -> "public" or "generated") and "free_query" (the
    sites where a query or a view selects the records). An entry without sites is left out."""
    found = {
        "declared": {name: declared[name] for name in sorted(names) if declared.get(name)},
        "free_query": sorted(free_query.intersection(names)),
    }
    return {key: sites for key, sites in found.items() if sites}


def collect_declarations(history: list[dict[str, Any]]) -> tuple[dict[str, str], set[str]]:
    """Collect from the saved rounds what the sites stated about their data. Return two things: site
    -> the kind of data that it declared last ("" for private), for all sites that took part; and
    the sites where a query or a view selected the records in any round."""
    declared = {
        name: entry.get("declared", {}).get(name, "")
        for entry in history
        for name in entry["participants"]
    }
    return declared, {name for entry in history for name in entry.get("free_query", ())}


def _ranks(progress: Progress) -> dict[str, Any]:
    """Build the report's table of the ranks that sites trained; {} if all trained the plan's full
    rank. The table's entries:

    - sites: site -> rank
    - of: the plan's rank
    - columns: a row for each range of B's columns, from "first" to "last". Its "share" is the share
      of the sites' weight that trained these columns, averaged over rounds; its "noise" is relative
      to the noise of columns that every site trains. "noise" is None in a run without noise, with
      AdamW, and with a strategy that takes no mean.

    The mean's divisor is the weight of all sites. So in columns that few sites train the signal
    falls in proportion to the share, and the noise falls by less."""
    study = progress.study
    history = progress.history
    ranks = lora_ranks(progress.history)
    if study.lora is None or set(ranks.values()) <= {study.lora.rank}:
        return {}
    declared = study.strategy.weights == "declared"
    weights = {name: progress.sizes[name] if declared else 1 for name in ranks}
    share = np.zeros(study.lora.rank)
    noise = np.zeros(study.lora.rank)
    most = 0.0
    for entry in history:
        trained = entry["lora_ranks"]
        counted = weights | entry.get("weights", {})
        total = sum(counted[name] for name in trained)
        for name, rank in trained.items():
            columns, part = rank_slice(study.lora, rank, entry["round"]), counted[name] / total
            share[columns] += part / len(history)
            noise[columns] += (part * _noise(progress, name)) ** 2
            most += (part * _noise(progress, name)) ** 2
    is_known = (
        study.private
        and study.training.optimizer == "sgd"
        and STRATEGIES.load(study.strategy.name).is_mean
    )
    rows: list[dict[str, Any]] = []
    for column, pair in enumerate(zip(share, np.sqrt(noise / most), strict=True), 1):
        values = [round(float(value), 9) for value in pair]
        if not rows or [rows[-1]["share"], rows[-1]["noise"]] != values:
            rows.append({"first": column, "share": values[0], "noise": values[1]})
        rows[-1]["last"] = column
    for row in () if is_known else rows:
        row["noise"] = None
    return {"sites": dict(sorted(ranks.items())), "of": study.lora.rank, "columns": rows}


def _noise(progress: Progress, name: str) -> float:
    """Return a number proportional to the standard deviation of the noise in the SGD update of the
    site `name`: σ / (q · declared size). The factor that is left out is the same for all sites.
    Return 1.0 for a site without a step log."""
    events = progress.events.get(name)
    if not events:
        return 1.0
    divisor = max(e["q"] for e in events) * progress.sizes[name]
    return float(min(e["sigma"] for e in events) / divisor)


def describe_cap(weight: int, declared: int) -> str:
    return f"counts as {weight} of {declared} declared: no more than a multiple of the median"


def _describe_caps(progress: Progress) -> dict[str, str]:
    """Return, for each site whose weight in the mean was ever limited to less than its declared
    size, site -> a text that states the newest limit."""
    weights: dict[str, int] = {}
    for entry in progress.history:
        weights |= entry.get("weights", {})
    return {
        name: describe_cap(most, progress.sizes[name]) for name, most in sorted(weights.items())
    }


def absences(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return for each site that missed a round: "rounds", the number of rounds that it missed;
    "longest_rounds" and "longest_seconds", the length of its longest absence; and "reasons", how
    often each reason was given.

    The seconds of an absence are the sum of its rounds' durations, by a monotonic clock. A round in
    which a site was not asked neither counts as missed nor ends an absence."""
    sites: dict[str, dict[str, Any]] = {}
    ongoing: dict[str, tuple[int, float]] = {}  # the absence in progress: rounds, seconds
    for entry in history:
        for name in entry["participants"]:
            ongoing.pop(name, None)
        for name, why in sorted(entry["missing"].items()):
            counts = sites.setdefault(
                name, {"rounds": 0, "longest_rounds": 0, "longest_seconds": 0.0, "reasons": {}}
            )
            rounds, seconds = ongoing.get(name, (0, 0.0))
            ongoing[name] = rounds + 1, seconds + entry["seconds"]
            counts["rounds"] += 1
            counts["longest_rounds"] = max(counts["longest_rounds"], ongoing[name][0])
            counts["longest_seconds"] = round(max(counts["longest_seconds"], ongoing[name][1]), 3)
            counts["reasons"][why] = counts["reasons"].get(why, 0) + 1
    return dict(sorted(sites.items()))


def _privacy(progress: Progress, parts: Dependencies) -> dict[str, Any]:
    study = progress.study
    assert isinstance(study.privacy, PrivacyTable)
    common = {
        "delta": study.privacy.delta,
        "unit": study.privacy.unit,
        "sampling": study.privacy.sampling,
        "records_per_unit": study.records_per_draw,
        "relation": RELATION,
        "accountant": parts.accountant(),
        "clipping": study.clipping.mode if study.clipping else None,
    }
    sites = {}
    for name, epsilon in epsilons(progress, parts).items():
        events = progress.events[name]
        own = min(e["sigma"] for e in events)
        sites[name] = common | {
            "epsilon": epsilon,
            "noise_multiplier": joint_sigma(own, noise_shares(study)),
            "max_grad_norm": max(e["max_grad_norm"] for e in events),
            "sampling_rate": max(e["q"] for e in events),
            "steps": sum(e["steps"] for e in events),
            "key": progress.keys.get(name),
        }
        if table := study.secure_aggregation:
            sites[name]["secure_aggregation"] = {
                "sites": study.strategy.min_sites,
                "colluding": table.colluding,
                "own_noise_multiplier": own,
                "fallback_epsilon": _epsilon(events, parts, study.privacy),
            }
    worst = max(
        sites.values(), key=lambda site: site["epsilon"], default={**common, "epsilon": 0.0}
    )
    privacy = {**{k: v for k, v in worst.items() if k != "key"}, "sites": sites}
    if study.private_evaluation is not None:
        privacy["evaluation"] = _evaluation(progress, parts, study.privacy)
    return privacy


def _evaluation(progress: Progress, parts: Dependencies, privacy: PrivacyTable) -> dict[str, Any]:
    """Build the report's table of the ε that the queries cost the units of the held-out records. It
    holds the figures of the site with the largest ε and, under "sites", the figures of each site.
    "with_training" is the ε of a unit that also has training records at the site, which the
    coordinator cannot rule out."""
    table = progress.study.private_evaluation
    assert table is not None
    common = {
        "delta": privacy.delta,
        "unit": privacy.unit,
        "noise_multiplier": table.noise_multiplier,
        "steps": 0,
    }
    sites = {}
    for name, events in sorted(progress.queries.items()):
        both = [*progress.events.get(name, []), *events]
        sites[name] = common | {
            "epsilon": _epsilon(events, parts, privacy),
            "with_training": _epsilon(both, parts, privacy),
            "noise_multiplier": min(e["sigma"] for e in events),
            "steps": sum(e["steps"] for e in events),
        }
    nothing = {**common, "epsilon": 0.0}
    worst = max(sites.values(), key=lambda site: site["epsilon"], default=nothing)
    both_files = max((site["with_training"] for site in sites.values()), default=0.0)
    return {**worst, "with_training": both_files, "sites": sites}


def judge_adapter(
    progress: Progress, evaluator: Measures, selector: Measures | None
) -> dict[str, Any]:
    """Measure the trained adapter for the report. Return "gain", its gain over the base and over
    the public start, with intervals; and, if the plan has selection records, "selection_records",
    their number.

    evaluator: measures on the [evaluation] records. selector: measures on the [selection] records,
    None if the plan has none."""
    start = progress.origin if progress.study.start and progress.origin else None
    gain = {"gain": evaluator.gain(progress.adapter, start)}
    return gain if selector is None else gain | {"selection_records": len(selector)}


def with_start_released(
    quality: dict[str, Any], progress: Progress, evaluator: Measures
) -> dict[str, Any]:
    """Return the report's table `quality` as it must be if the run releases its public start. In
    the result "after" and "gain" describe the public start; "trained", in the table and in the
    gain's intervals, describes the trained model; and gain.over_start compares the trained model
    with the start."""
    trained, gain = quality["gain"], evaluator.gain(progress.origin)
    for name, bounds in gain.get("intervals", {}).items():
        bounds[TRAINED] = trained["intervals"][name]["after"]
    gain["over_start"] = trained["over_start"]
    return {**quality, "after": progress.started, TRAINED: quality["after"], "gain": gain}


def counts_are_told(progress: Progress) -> bool:
    """Return whether a report may state the sites' noised number of units in each class. It may if
    the plan adds noise and more than one site took part."""
    took_part = {name for entry in progress.history for name in entry["participants"]}
    return progress.study.private and len(took_part) > 1


def classes(
    progress: Progress, evaluator: Measures | None, figures: ClassFigures | None, released: Arrays
) -> list[dict[str, Any]]:
    """Build the report's table of classes: a row for each class, in the order of the plan; [] for a
    study without classes, or if there is nothing to tell of them. It costs no ε, since it is
    post-processing of noised sums.

    - progress: the run's state
    - evaluator: measures on the [evaluation] records; None if the plan has none
    - figures: the strategy's figures of each class; None if it has none
    - released: the arrays of the released adapter

    A row's entries:
    - name: the class
    - the released adapter's figures on the evaluation records, if the plan has them
    - known_from, with privacy and `figures`: "public records" if the class has any; "sites" if its
      noised count exceeds EVIDENT standard deviations of the noise; "public records and sites" if
      both are so; else "nothing"
    - units and deviation, if `counts_are_told` too: the noised number of the class's units, and the
      standard deviation of this noise"""
    names = progress.study.objective.labels
    if not names:
        return []
    rows = evaluator.by_class(released) if evaluator else [{"name": name} for name in names]
    if figures is None or not progress.study.private:
        return rows if evaluator else []
    for index, row in enumerate(rows):
        sources = {"public records": figures.public[index], "sites": figures.evident[index]}
        known = [source for source, knows in sources.items() if knows]
        row["known_from"] = " and ".join(known) or "nothing"
        if counts_are_told(progress):
            row |= {"units": float(figures.count[index]), "deviation": float(figures.deviation)}
    return rows


def measure_start(progress: Progress, evaluator: Measures | None) -> None:
    """Measure, on the evaluation records, the base alone and the public start (if the plan has
    one), and store their figures in `progress`. Do nothing if `evaluator` is None: the plan has no
    [evaluation]."""
    if evaluator is None:
        return
    with stage("before the rounds"):
        progress.before = evaluator.follow(None)
        if progress.study.start:
            progress.started = evaluator.follow(progress.adapter)


def _quality(progress: Progress) -> dict[str, Any]:
    table = progress.study.evaluation
    if table is None:
        return {}
    measured = [{"round": h["round"], **h["quality"]} for h in progress.history if h["quality"]]
    started = {"start": progress.started} if progress.started else {}
    keys = ("round", "keep", "step", "selection")
    chosen = [{key: h[key] for key in keys} for h in progress.history if "step" in h]
    return {
        "metric": table.metric,
        "before": progress.before,
        **started,
        **({"selection": chosen} if chosen else {}),
        **({"expected": progress.expected} if progress.expected else {}),
        "after": {k: v for k, v in measured[-1].items() if k != "round"} if measured else {},
        "by_round": measured,
    }


def _adapter(progress: Progress) -> dict[str, Any]:
    lora = progress.study.lora
    table: dict[str, Any] = {
        "folder": "adapter",
        "parameters": int(sum(array.size for array in progress.adapter.values())),
    }
    return table | lora.model_dump(mode="json", exclude_none=True) if lora else table
