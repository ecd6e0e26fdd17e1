"""Check a run's report against the evidence that its sites signed.

Errors: NotGenuine. If the content is malformed, a function may instead raise any error of
signed_files.MALFORMED."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import fedtune
from fedtune.core.config import PrivacyTable, Study, noise_shares
from fedtune.core.dp.accountant import Steps, at_least, epsilon
from fedtune.core.dp.shared_noise import joint_sigma, own_sigma
from fedtune.core.errors import NotGenuine
from fedtune.core.files import reading
from fedtune.core.registry.metrics import METRICS
from fedtune.core.run_folder import TRAINED as TRAINED_FOLDER
from fedtune.core.wire import seal
from fedtune.evidence import fingerprints, step_summary
from fedtune.evidence.sign import EVIDENCE
from fedtune.evidence.signed_files import TODO, fail
from fedtune.evidence.step_summary import Agreed
from fedtune.report import gain
from fedtune.report.claim import RELATION, assumption
from fedtune.report.gain import START, TRAINED
from fedtune.report.quality import headline_lines

SAME = 1e-9  # relative difference up to which two computations of a figure count as equal
# Limits on one site's steps and ε. No useful run exceeds them, and the accountant would take
# minutes to days: a folder from a stranger may claim any number.
MOST_STEPS, MOST_EPSILON = 10**6, 1000.0
MOST_KINDS = 256  # of steps that one site ran for a student and all its teachers
STEP = ("noise_multiplier", "sampling_rate", "max_grad_norm", "steps")
SHARED = {"sites", "colluding", "own_noise_multiplier", "fallback_epsilon"}


def check_release(run: Path, study: Study, report: dict[str, Any], files: Collection[str]) -> str:
    """Check which model the report says is released, the trained one or the public start. This must
    follow from the plan's rule and the reported figures, and fit the signed files. Return this
    model, as TRAINED or START; "" if the plan leaves no choice.

    - run: the run's folder
    - study: the run's plan
    - report: the content of report.json
    - files: the files that the run's signature covers, by their paths in the folder

    If the public start is released, this check cannot show that the weights in adapter/ come from
    public text alone: only the coordinator vouches for that.

    Errors: NotGenuine."""
    path, quality = run / "report.json", report.get("quality") or {}
    decision = quality.get("released")
    chooses = bool(study.start and study.selection and not study.continuous)
    if (decision is not None) is not chooses:
        fail(path, f"released is {str(decision)[:64]!r}", "what the plan says of what is released")
    model = str((decision or {}).get("model", ""))
    kept = any(name.startswith(f"{TRAINED_FOLDER}/") for name in files)
    if kept is not (model == START):
        fail(run / TRAINED_FOLDER, "does not fit what the report says is released", model or "none")
    if decision is None or study.selection is None:
        return ""
    figures = [decision.get(name) for name in (TRAINED, START)]
    expected = TRAINED  # if the plan says so, or the selection records cannot decide
    blind = "lacking" in decision and "unseen" not in decision
    if study.selection.release == "better" and not blind:
        metric = study.evaluation.metric if study.evaluation else "loss"
        _require_equal(path, "released's metric", decision["metric"], metric)
        sign = 1 if METRICS[metric].higher_is_better else -1
        unseen = _compute_unseen_share(quality, decision.get("lacking", []))
        if "lacking" in decision:
            _require_equal(
                path, "released's unseen", round(decision["unseen"], 6), round(unseen, 6)
            )
        expected = gain.choose_better(sign * (figures[0] - figures[1]), unseen)
    _require_equal(path, "released's model", model, expected)
    if model == START and quality.get("metric"):
        _require_equal(
            path, "the released model's figures", quality.get("after"), quality.get("start")
        )
        _require_equal(
            path, "the trained model's figures", isinstance(quality.get("trained"), dict), True
        )
    return model


def _compute_unseen_share(quality: dict[str, Any], lacking: Collection[str]) -> float:
    """Return the share of the sites' units that are in the classes `lacking`; 0 if `lacking` is
    empty. The numbers of units are the noised counts in the report.

    - quality: the report's table "quality"
    - lacking: the names of the classes to which no selection record belongs"""
    counts = {row["name"]: max(row["units"], 0.0) for row in quality["classes"]} if lacking else {}
    total = sum(counts.values())
    return sum(counts[name] for name in lacking) / total if total else 0.0


def headline(run: Path, report: dict[str, Any]) -> None:
    """Check that report.json and report.md hold the sentences about quality that follow from the
    report's figures. Only a report of this release is checked, since the sentences of another
    release may differ; `Verified.made_by` names the release. Of a merged run, only the sentences in
    report.json are checked.

    run: the run's folder, with report.md; report: the content of report.json. Errors: NotGenuine if
    a sentence is missing or differs."""
    quality = report.get("quality") or {}
    if report.get("fedtune") != fedtune.__version__:
        return
    said = [line.text for line in gain.headline(quality)]
    if quality.get("headline", []) != said:
        fail(run / "report.json", "quality.headline is not what its figures say", "; ".join(said))
    page = reading.text(run / "report.md", "the report of a run", TODO, NotGenuine)
    for line in headline_lines(report) if "merge" not in report else ():
        if line not in page.splitlines():
            fail(run / "report.md", "leaves out what the figures say", line.strip("*"))


Events = dict[str, list[dict[str, Any]]]
# The status that a site signs for each kind of work, without and with secure aggregation.
DONE = {"update": ("trained", "masked"), "answer": ("answered", "answered")}


def seals(
    run: Path, content: dict[str, Any], study: Study, coordinator: str, enrolled: bool
) -> dict[str, Events]:
    """Verify the site's signature of every update and answer. Return the newest step logs: a dict
    with the keys "update" and "answer", where each value maps a site to its step log of this work.

    - run: the run's folder, for the errors' texts
    - content: the content of evidence.json
    - study: the run's plan
    - coordinator: the public key that signed the run
    - enrolled: whether each message must be sealed for this key as its receiver; False for a
      simulation

    Errors: NotGenuine."""
    events: dict[str, Events] = {"update": {}, "answer": {}}
    if content.get("plan") != study.digest:
        fail(run / EVIDENCE, "is of another plan", study.digest)
    keys = [site["signing"] for site in content["sites"].values()]
    if len({*keys}) < len(keys):
        fail(run / EVIDENCE, "has one key for two sites")
    for entry in content["updates"]:
        where = f"{run / EVIDENCE}, round {int(entry['round'])}, {str(entry['site'])[:64]!r}"
        key = content["sites"][entry["site"]]["signing"]
        kind = entry["kind"]
        said = entry["said"]
        done = DONE[kind][bool(study.secure_aggregation)]
        if (said["status"], said["name"]) != (done, entry["site"]):
            fail(where, "is of another kind of work, or of another site", done)
        header = json.loads(entry["header"])
        if enrolled and header["receiver"] != coordinator:
            fail(where, "was sealed for another coordinator", "the one that signed the run")
        expected = seal.Header(
            plan=study.digest,
            round=entry["round"],
            base=study.base.digest or "",
            site=entry["site"],
            receiver=header["receiver"],
            nonce=header["nonce"],
            body=seal.digest_of(entry["arrays"], said),
            ledger={},
        )
        try:
            seal.open_seal(entry, key, expected)
        except seal.SealError as error:
            fail(where, error.happened, "what the site signed")
        log = step_summary.parse(said["events"]) if study.private else []
        if study.private and not step_summary.has_grown(events[kind].get(entry["site"], []), log):
            fail(where, "its step log has no step for this round", "a longer log in every round")
        events[kind][entry["site"]] = log
    return events


def rounds(run: Path, content: dict[str, Any], study: Study, report: dict[str, Any]) -> int:
    """Check that the evidence holds every round of the plan (or its first rounds, if the plan may
    end early), and that in each round the report's participants are the sites that signed an
    update. Return the number of updates of all sites.

    - run: the run's folder, for the errors' texts
    - content: the content of evidence.json
    - study: the run's plan
    - report: the content of report.json

    Errors: NotGenuine."""
    signed: dict[int, list[str]] = {}
    updates = [entry for entry in content["updates"] if entry["kind"] == "update"]
    for entry in updates:
        signed.setdefault(entry["round"], []).append(entry["site"])
    said = {row["round"]: sorted(row["participants"]) for row in report["rounds"]}
    for number in sorted({*said, *signed}):
        if said.get(number) != sorted(signed.get(number, [])):
            fail(
                run / "report.json",
                f"who took part in round {number} is not who signed an update of it",
            )
    last = study.training.rounds
    early = study.continuous or study.selection is not None
    complete = last is None or len(signed) == last or (early and len(signed) < last)
    if not signed or sorted(signed) != [*range(1, len(signed) + 1)] or not complete:
        fail(run / EVIDENCE, f"has {len(signed)} rounds", f"all {last or ''} rounds of the plan")
    return len(updates)


def count_absent(
    content: dict[str, Any], study: Study, events: dict[str, Events]
) -> dict[str, dict[str, Any]]:
    """Count the updates and answers of each site that the evidence lacks. Return a dict from each
    site of which something is lacking to a dict with these entries:

    - "rounds": the number of the plan's rounds without an update of the site; left out if it is 0
    - "answers": the number of the plan's queries without an answer of the site; left out if it is 0
    - "epsilon": the ε that the site would have spent with one more answer to each of these rounds
    - "fallback": if the plan shares its noise, the same by the site's own noise alone
    - "answers_epsilon": the same ε of the answers to the plan's queries, if it has any

    Each ε is given only for a private study whose plan states the number of rounds; "epsilon" and
    "fallback" only if they do not take minutes to compute. They matter since the evidence does not
    show whether a site was away or somebody left its updates out. A site's step log may have more
    steps than the rounds that are there, of rounds that were repeated or whose update was lost;
    nobody can tell which, so that the rounds which are missing are added to all of them.

    - content: the content of evidence.json
    - study: the run's plan
    - events: a dict with the keys "update" and "answer"; each value maps a site to its step log of
      this work, as `seals` returns them"""
    there: dict[str, Counter[str]] = {name: Counter() for name in events["update"]}
    for kind, entry in {(e["kind"], (e["site"], e["round"])) for e in content["updates"]}:
        there.setdefault(entry[0], Counter())[kind] += 1
    last = study.training.rounds
    rounds = last or max(counted["update"] for counted in there.values())
    found = dict[str, dict[str, Any]]()
    for name, counted in sorted(there.items()):
        lacks = {"rounds": rounds - counted["update"]}
        lacks["answers"] = len(study.queries) - counted["answer"]
        if any(lacks.values()):
            found[name] = {what: number for what, number in lacks.items() if number}
            if last and isinstance(study.privacy, PrivacyTable):
                logs = {kind: of_site.get(name, []) for kind, of_site in events.items()}
                found[name] |= _of_all(study, study.privacy, logs, lacks)
    return found


def _of_all(
    study: Study, privacy: PrivacyTable, logs: Events, missing: Mapping[str, int]
) -> dict[str, float]:
    """Compute which ε a site would have spent if it had taken part in everything. Return a dict:
    "epsilon" is for the steps of its updates and, with steps like these, the missing rounds;
    "fallback", if the plan shares its noise, for the same by the site's own noise alone;
    "answers_epsilon" for its answers to queries and the missing ones. The first two are left out if
    no round is missing, if there are more than MOST_STEPS steps, if the run has no update of the
    site, or where ε is above MOST_EPSILON; "answers_epsilon" if the plan has no queries.

    - study: the run's plan
    - privacy: the plan's table [privacy]
    - logs: the site's step logs of this run, under "update" and "answer"
    - missing: under "rounds" and "answers", the numbers of the plan's rounds and queries of which
      the run has none"""
    log, rounds = logs["update"], missing["rounds"]
    more = rounds * study.training.local_steps
    costs = dict[str, float]()
    if log and rounds and sum(event["steps"] for event in log) + more <= MOST_STEPS:
        honest, whole = noise_shares(study), [*log, _costliest(log) | {"steps": more}]
        for name, shares in {"epsilon": honest, "fallback": 1}.items():
            stated = name == "epsilon" or honest > 1
            if stated and _bound_epsilon(whole, privacy, shares) <= MOST_EPSILON:
                costs[name] = _steps_epsilon(whole, privacy, shares)
    if table := study.private_evaluation:
        answers = sum(event["steps"] for event in logs["answer"]) + missing["answers"]
        asked = Steps(table.noise_multiplier, 1.0, answers, 1)
        costs["answers_epsilon"] = epsilon([asked], privacy.delta)
    return costs


def _costliest(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an event of which each step costs at least as much as any step of the step log `log`.
    A site that declares another size in mid-study has steps of several sampling rates."""
    least = min(event["sigma"] for event in log)
    return log[0] | {"sigma": least} | {k: max(e[k] for e in log) for k in ("q", "records")}


def privacy(
    run: Path,
    study: Study,
    report: dict[str, Any],
    keys: Mapping[str, Mapping[str, str]],
    events: dict[str, Events],
) -> dict[str, Any]:
    """Compute ε from the sites' step logs, and check that the report states the same figures.
    Return fields of verify.Verified as a dict.

    - run: the run's folder, for the errors' texts
    - study: the run's plan
    - report: the content of report.json
    - keys: site -> its public keys: "signing", and of an enrolled site "node" and "tls"
    - events: a dict with the keys "update" and "answer"; each value maps a site to its step log of
      this work, as `seals` returns them

    The dict always has "sites": site -> a dict of its fingerprint and its signing key and, in a
    private study, its ε and its number of steps. For a private study it also has "epsilon",
    "delta", "unit", "with_queries" and "capped"; with secure aggregation also "assumption" and
    "fallback"; and "with_teacher" if the report states the ε of this run and its teacher together.

    Errors: NotGenuine."""
    path = run / "report.json"
    shown: dict[str, dict[str, Any]] = {
        name: {"fingerprint": _site_fingerprint(name, keys[name]), "key": keys[name]["signing"]}
        for name in sorted(events["update"])
    }
    if report.get("private") is not study.private:
        fail(path, f"private is {str(report.get('private'))[:24]}", "what the plan says")
    _require_equal(path, "study", report.get("study"), study.study.name)
    _require_equal(path, "plan_digest", report.get("plan_digest"), study.digest)
    if teacher := study.objective.resolved.teacher_spec:
        named = (report.get("teacher") or {}).get("digest")
        _require_equal(path, "the teacher's digest", named, teacher.digest)
    privacy = study.privacy
    if not isinstance(privacy, PrivacyTable):
        return {"sites": shown}
    _logs(run, study, privacy, len(report["rounds"]), events)
    said = _without_teacher(path, study, report, privacy)
    _require_equal(path, "sites", sorted(said["sites"]), sorted(events["update"]))
    for table in (said, *said["sites"].values()):
        _require_equal(path, "delta", table.get("delta"), privacy.delta)
        _require_equal(path, "unit", table.get("unit"), privacy.unit)
        records = table.get("records_per_unit", 1)  # 1 is also what claim.best_guess takes it for
        _require_equal(path, "records_per_unit", records, study.records_per_draw)
        _require_equal(path, "relation", table.get("relation"), RELATION)
        _require_equal(path, "sampling", table.get("sampling"), privacy.sampling)
        mode = study.clipping.mode if study.clipping else None
        _require_equal(path, "clipping", table.get("clipping"), mode)
    spent, capped = dict[str, float](), False
    for name, log in events["update"].items():
        site = said["sites"][name]
        steps = sum(event["steps"] for event in log)
        _agree(path, f"{name}'s steps", site.get("steps"), steps)
        value, beyond = _epsilon(log, study, privacy)
        spent[name], capped = value, capped or beyond
        _agree(path, f"{name}'s epsilon", site.get("epsilon"), value)
        own = min(e["sigma"] for e in log)
        sigma = joint_sigma(own, noise_shares(study))
        _agree(path, f"{name}'s σ", site.get("noise_multiplier"), sigma)
        _agree(path, f"{name}'s q", site.get("sampling_rate"), max(e["q"] for e in log))
        norm = max(e["max_grad_norm"] for e in log)
        _agree(path, f"{name}'s max_grad_norm", site.get("max_grad_norm"), norm)
        _check_composed_steps(path, name, report["privacy"]["sites"][name], site)
        _fallback(path, name, site.get("secure_aggregation"), study, privacy, log)
        _require_equal(path, f"{name}'s key", site.get("key"), keys[name]["signing"])
        shown[name] |= {"epsilon": value, "steps": steps}
    largest = max(spent.values())
    _agree(path, "epsilon", said.get("epsilon"), largest)
    costliest = [site for name, site in said["sites"].items() if spent[name] == largest]
    if not any(all(said.get(key) == site[key] for key in STEP) for site in costliest):
        fail(path, "the run's σ, q, max_grad_norm or steps", "those of the site with the largest ε")
    worst = events["update"][max(spent, key=lambda name: spent[name])]
    _fallback(path, "the run", said.get("secure_aggregation"), study, privacy, worst)
    queried = _queries(path, said.get("evaluation"), events, privacy)
    claim: dict[str, Any] = {"epsilon": largest, "delta": privacy.delta, "unit": privacy.unit}
    claim["with_queries"] = queried
    if said is not report["privacy"]:
        claim["with_teacher"] = report["privacy"]["epsilon"]
    if table := study.secure_aggregation:
        claim["assumption"] = assumption(study.strategy.min_sites, table.colluding)
        logs = events["update"].values()
        claim["fallback"] = max(_steps_epsilon(log, privacy) for log in logs)
    return claim | {"sites": shown, "capped": capped}


def _check_composed_steps(
    path: Path, name: str, stated: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    """Check the steps from which a derived model's ε is composed: those in a site's entry of the
    report. Only a run with a private teacher states them; they must include the run's own steps,
    and cost the stated ε.

    - path: the path of report.json, for the errors' texts
    - name: the site's name
    - stated: the site's entry in the report
    - own: the entry as it is for this run's own rounds (`_without_teacher`)

    Errors: NotGenuine."""
    shared = own.get("secure_aggregation") or {}
    if stated.get("own_epsilon") is None or "epsilon" not in stated:
        extra = sorted({"events", "known_as"} & {*stated}) + sorted({*shared} - SHARED)
        return _require_equal(path, f"{name}'s further figures", extra, [])
    steps = [Steps(*event) for event in stated["events"]]
    kind = own["noise_multiplier"], own["sampling_rate"], own.get("records_per_unit", 1)
    same = [each for each in steps if (each[0], each[1], each.records) == kind]
    has = sum(each.steps for each in same)
    _require_least(path, f"{name}'s steps with its teacher's", has, own["steps"])
    if len(steps) > MOST_KINDS or sum(each.steps for each in steps) > MOST_STEPS:
        fail(path, f"{name}'s steps with its teacher's are too many to account for")
    if max(at_least(each, stated["delta"]) for each in steps) > MOST_EPSILON:
        fail(path, f"{name}'s steps with its teacher's cost too much to account for")
    _agree(path, f"{name}'s epsilon", stated["epsilon"], epsilon(steps, stated["delta"]))


def _without_teacher(
    path: Path, study: Study, report: dict[str, Any], privacy: PrivacyTable
) -> dict[str, Any]:
    """Return the report's table "privacy" as it is for this run's own rounds. It differs from the
    report only if the plan has a teacher and the report states the ε of both trainings together:
    each "own_epsilon" then takes the place of the "epsilon" beside it.

    The stated ε of both trainings is at least this run's own, and holds at the plan's δ or a
    smaller one. What the teacher adds to it only the coordinator vouches for.

    - path: the path of report.json, for the errors' texts
    - study: the run's plan
    - report: the content of report.json
    - privacy: the plan's table [privacy]

    Errors: NotGenuine if the ε of both trainings is below an ε that it must include, or holds at a
    larger δ than the plan's."""
    said: dict[str, Any] = report["privacy"]
    teacher = report.get("teacher") or {}
    if "student_epsilon" not in teacher or study.objective.resolved.teacher_spec is None:
        return said
    own = {"epsilon": teacher["student_epsilon"], "delta": privacy.delta}
    own["unit"] = _unit_without_teacher(said, privacy)
    sites = dict[str, dict[str, Any]]()
    for name, site in said["sites"].items():
        _require_least(path, "epsilon", said["epsilon"], site["epsilon"])
        if "own_epsilon" in site:  # the report also lists sites that trained the teacher alone
            _require_least(path, f"{name}'s epsilon", site["epsilon"], site["own_epsilon"])
            alone = {"epsilon": site["own_epsilon"], "delta": privacy.delta}
            alone["unit"] = _unit_without_teacher(site, privacy)
            sites[name] = _without_teachers_noise(path, name, site) | alone
    for table in (said, *said["sites"].values()):
        if not 0 < table["delta"] <= privacy.delta:
            fail(path, f"delta is {table['delta']}", f"at most the plan's, {privacy.delta}")
    if asked := said.get("evaluation"):
        least = max(site["with_training"] for site in asked["sites"].values())
        _require_least(path, "with_training", asked["with_training"], least)
        own["evaluation"] = asked | {"with_training": least}
    return _without_teachers_noise(path, "the run", said) | own | {"sites": sites}


def _unit_without_teacher(said: dict[str, Any], privacy: PrivacyTable) -> str:
    """Return the unit for which a student's own ε holds. It is the plan's if the ε of both
    trainings is for a record, the weaker unit, since the teacher's ε may have been; otherwise it is
    as stated. said: the report's figures of the run or of a site; privacy: the plan's table
    [privacy]."""
    return privacy.unit if said["unit"] == "record" else str(said["unit"])


def _without_teachers_noise(path: Path, name: str, said: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of a site or of the run, with what it says of the noise that sites
    shared in this run's own rounds alone, in place of what it says of both trainings.

    - path: the path of report.json, for the errors' texts
    - name: the site's name, or "the run", for the errors' texts
    - said: the report's figures of this site, or of the run

    Errors: NotGenuine if the ε by the site's own noise alone is below this run's own."""
    table = said.get("secure_aggregation") or {}
    if "assumptions" not in table:
        return said
    kept = {key: value for key, value in said.items() if key != "secure_aggregation"}
    if (own := kept.pop("own_secure_aggregation", None)) is None:
        return kept
    what = f"{name}'s fallback ε"
    _require_least(path, what, table.get("fallback_epsilon"), own["fallback_epsilon"])
    return kept | {"secure_aggregation": own}


def _logs(
    run: Path, study: Study, privacy: PrivacyTable, rounds: int, events: dict[str, Events]
) -> None:
    """Check that every step log belongs to this plan, and that its ε can be computed in seconds.

    - run: the run's folder, for the errors' texts
    - study: the run's plan
    - privacy: the plan's table [privacy]
    - rounds: the number of rounds in the report; used if the plan states no number
    - events: a dict with the keys "update" and "answer"; each value maps a site to its step log of
      this work

    Errors: NotGenuine."""
    training = study.training
    table = study.private_evaluation
    clipping = study.clipping
    shares = noise_shares(study)
    for name, log in events["update"].items():
        # The logged figures count where the plan gives none: they follow from the site's size and
        # ε.
        rate, sigma = log[0]["q"], log[0]["sigma"]
        if not _is_rate(study, rate):
            fail(run / EVIDENCE, f"{name[:64]!r}: its step log shows another rate than the plan's")
        if privacy.noise_multiplier is not None:
            sigma = own_sigma(privacy.noise_multiplier, shares)
        assert clipping is not None  # Study: a private study clips
        agreed = Agreed(
            sampling_rate=rate,
            noise_multiplier=sigma,
            max_grad_norm=clipping.max_grad_norm,
            records=study.records_per_draw,
            steps=(training.rounds or rounds) * training.local_steps,
        )
        _log(run, name, log, agreed)
        if _bound_epsilon(log, privacy, shares) <= _cap(study, privacy):
            _refuse_uncomputable(
                run, name, log, _bound_epsilon(log, privacy)
            )  # by the site's own noise, from which the fallback ε is computed too
    for name, log in events["answer"].items():
        agreed = Agreed(
            sampling_rate=1.0,
            noise_multiplier=table.noise_multiplier if table else math.nan,
            max_grad_norm=study.query_norm,
            records=1,
            steps=len(study.queries),
        )
        _log(run, name, log, agreed)
        _refuse_uncomputable(run, name, log, _bound_epsilon(log, privacy))


def _is_rate(study: Study, rate: float) -> bool:
    """Return whether a step log's sampling rate fits the plan, i.e. whether there is a declared
    size of a site for which the plan gives this rate. study: the run's plan."""
    if study.training.sampling_rate is not None:
        return math.isclose(rate, study.training.sampling_rate, rel_tol=SAME)
    assert study.training.expected_batch is not None  # Study: exactly one given
    size = max(1, round(study.training.expected_batch / rate))
    return math.isclose(rate, min(1.0, study.training.expected_batch / size), rel_tol=SAME)


def _log(run: Path, name: str, log: list[dict[str, Any]], agreed: Agreed) -> None:
    """Check that a site's step log belongs to the plan.

    - run, name: the run's folder and the site's name, for the error's text
    - log: the site's step log
    - agreed: what the plan lays down for the site's steps

    Errors: NotGenuine if it does not."""
    if why := step_summary.objection(log, agreed):
        fail(f"{run / EVIDENCE}, {name[:64]!r}", why)


def _refuse_uncomputable(run: Path, name: str, log: list[dict[str, Any]], least: float) -> None:
    """Check that the ε of a step log can be computed in seconds: that it has not too many steps,
    and not too large an ε.

    - run, name: the run's folder and the site's name, for the error's text
    - log: the site's step log
    - least: a lower bound on the log's ε

    Errors: NotGenuine if it would take minutes or more."""
    where, sampled = f"{run / EVIDENCE}, {name[:64]!r}", any(e["q"] < 1 for e in log)
    if sampled and sum(e["steps"] for e in log) > MOST_STEPS:
        fail(where, "its step log has too many steps to account for", f"at most {MOST_STEPS:,}")
    if sampled and least > MOST_EPSILON:
        fail(where, f"its steps cost ε = {least:.3g} or more", f"at most {MOST_EPSILON:g}")


def _fallback(
    path: Path,
    name: str,
    said: Any,
    study: Study,
    privacy: PrivacyTable,
    log: list[dict[str, Any]],
) -> None:
    """Check what the report states about secure aggregation: the number of sites, up to how many
    colluding sites ε holds, and σ and ε by the site's own noise alone.

    - path: the path of report.json, for the errors' texts
    - name: the site's name, or "the run", for the errors' texts
    - said: the report's table "secure_aggregation" about this site or the run; it must be None if
      the plan has no secure aggregation
    - study: the run's plan
    - privacy: the plan's table [privacy]
    - log: the site's step log; for the run, that of the site with the largest ε

    Errors: NotGenuine."""
    if (table := study.secure_aggregation) is None:
        return _require_equal(path, f"{name}'s secure_aggregation", said, None)
    rule = f"{name}'s secure_aggregation"
    _require_equal(path, rule, said.get("sites"), study.strategy.min_sites)
    _require_equal(path, rule, said.get("colluding"), table.colluding)
    own = min(e["sigma"] for e in log)
    _agree(path, f"{name}'s own σ", said.get("own_noise_multiplier"), own)
    fallback = _steps_epsilon(log, privacy)
    _agree(path, f"{name}'s fallback ε", said.get("fallback_epsilon"), fallback)


def _queries(
    path: Path, said: Any, events: dict[str, Events], privacy: PrivacyTable
) -> float | None:
    """Check what the report states about private evaluation against the sites' signed answers.
    Return the largest ε that a site's training and answers cost together; None if no site answered.

    - path: the path of report.json, for the errors' texts
    - said: the table "evaluation" in the report's table "privacy"; None if there is none
    - events: a dict with the keys "update" and "answer"; each value maps a site to its step log of
      this work
    - privacy: the plan's table [privacy]

    Errors: NotGenuine."""
    answered, sites = events["answer"], (said or {}).get("sites", {})
    _require_equal(path, "evaluation's sites", sorted(sites), sorted(answered))
    both = dict.fromkeys(answered, 0.0)
    for name, log in answered.items():
        both[name] = _steps_epsilon([*events["update"].get(name, []), *log], privacy)
        own = _steps_epsilon(log, privacy)
        _agree(path, f"{name}'s evaluation", sites[name].get("epsilon"), own)
        _agree(path, f"{name}'s with_training", sites[name].get("with_training"), both[name])
    if not answered:
        return None
    most = max(_steps_epsilon(log, privacy) for log in answered.values())
    _agree(path, "evaluation", said.get("epsilon"), most)
    _agree(path, "with_training", said.get("with_training"), max(both.values()))
    return max(both.values())


def _cap(study: Study, privacy: PrivacyTable) -> float:
    """Return how much ε the plan lets one unit spend over all rounds of a study without a last
    round. A site leaves out a unit that has reached this bound. Return infinity if the plan sets no
    such bound. study: the run's plan; privacy: its table [privacy]."""
    return privacy.epsilon if study.continuous and privacy.epsilon is not None else math.inf


def _epsilon(log: list[dict[str, Any]], study: Study, privacy: PrivacyTable) -> tuple[float, bool]:
    """Compute the largest ε that one unit of a site can have spent. Return two things: this ε, and
    whether it is the plan's bound for one unit (`_cap`), because all steps in the log together
    would cost more. log: the site's step log; study: the run's plan; privacy: the plan's table
    [privacy]."""
    cap, shares = _cap(study, privacy), noise_shares(study)
    if _bound_epsilon(log, privacy, shares) > cap:
        return cap, True
    spent = _steps_epsilon(log, privacy, shares)
    return min(spent, cap), spent > cap


def _bound_epsilon(log: list[dict[str, Any]], privacy: PrivacyTable, shares: int = 1) -> float:
    """Return a lower bound on the ε of a site's steps. The time that this takes grows neither with
    the number of steps nor with ε, unlike the time for ε itself.

    - log: the site's step log
    - privacy: the plan's table [privacy]
    - shares: how many sites' noise adds up in the released sum; 1: the site's own noise alone"""
    return max(at_least(step, privacy.delta) for step in _steps(log, shares))


def _steps_epsilon(log: list[dict[str, Any]], privacy: PrivacyTable, shares: int = 1) -> float:
    """Compute the ε of a site's steps.

    - log: the site's step log
    - privacy: the plan's table [privacy]
    - shares: how many sites' noise adds up in the released sum; 1: the site's own noise alone"""
    return epsilon(_steps(log, shares), privacy.delta)


def _steps(log: list[dict[str, Any]], shares: int) -> list[Steps]:
    return [Steps(joint_sigma(e["sigma"], shares), e["q"], e["steps"], e["records"]) for e in log]


def _agree(path: Path, what: str, said: Any, computed: float) -> None:
    """Check that a stated figure is a number, and equals the computed one up to the relative error
    SAME.

    - path: the file with the statement, for the error's text
    - what: the figure's name, for the error's text
    - said: the figure as the file states it, of any type
    - computed: the figure as it follows from the sites' step logs

    Errors: NotGenuine."""
    number = isinstance(said, int | float) and not isinstance(said, bool)
    if not number or not math.isclose(said, computed, rel_tol=SAME):
        fail(
            path,
            f"{what} is {str(said)[:24]}",
            f"{computed:.6g}, which follows from the sites' step logs",
        )


def _require_least(path: Path, what: str, said: Any, least: float) -> None:
    """Check that a stated figure is a number, and is at least another one up to the relative error
    SAME.

    - path: the file with the statement, for the error's text
    - what: the figure's name, for the error's text
    - said: the figure as the file states it, of any type
    - least: the figure that it must include

    Errors: NotGenuine."""
    number = isinstance(said, int | float) and not isinstance(said, bool)
    if not number or not said >= least * (1 - SAME):
        fail(path, f"{what} is {str(said)[:24]}", f"at least {least:.6g}, which it includes")


def _require_equal(path: Path, what: str, said: Any, proven: Any) -> None:
    """Check that a stated value equals the one that the signatures prove.

    - path, what: the file with the statement, and the value's name, for the error's text
    - said: the value as the file states it, of any type
    - proven: the value as it follows from the plan and what the sites signed

    Errors: NotGenuine."""
    if said != proven:
        fail(path, f"{what} is {str(said)[:64]!r}", f"{proven!r}, as it was signed")


def _site_fingerprint(name: str, keys: Mapping[str, str]) -> str:
    if "node" not in keys:
        return ""
    return fingerprints.of_site(name, keys["node"], keys["tls"], keys["signing"])
