"""Build the page of a site: its budget, the plans that wait for its officer's signature, its
refusals, and its data."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.core.config import Site, load_site
from fedtune.core.config.state_files import COUNTS, LOSSES
from fedtune.core.data.sources._interface import REASONS
from fedtune.core.errors import FedtuneError
from fedtune.core.files import reading
from fedtune.core.registry.rounding import number
from fedtune.dashboard.pages import Notice, Page
from fedtune.observe.log import MOMENT, NAME
from fedtune.observe.status import FILE, GONE, LOCK, Snapshot, read_status

STUDIES = 4  # the number of newest studies whose losses are drawn as curves
PLAN = re.compile(r"sha256:[0-9a-f]{64}")


class SitePage(Page):
    """The dashboard's page of a site.toml. It is meant only for people at the site."""

    kind = "site"
    parts = ("top", "bottom")
    slow = ("budget", "plans", "acts")

    @property
    def title(self) -> str:
        return self._site().site.name

    def files(self) -> Iterable[Path]:
        site = self._site()
        names = (FILE, LOCK, COUNTS, LOSSES)
        return [*(site.site.state / name for name in names), *self.slow_files()]

    def slow_files(self) -> Iterable[Path]:
        site = self._site()
        ledger = site.site.ledger or site.home
        names = ("ledger.db", "ledger.db-wal", "ledger.head")
        others = [site.site.state / "plans", site.home / "audit.jsonl"]
        return [self.path, *others, *(ledger / name for name in names)]

    def read_context(self) -> dict[str, Any]:
        site = self._site()
        snapshot = None
        notices = list[Notice]()
        with suppress(FedtuneError):
            snapshot = read_status(site.site.state)
        if snapshot and snapshot.state == "gone":
            notices.append(Notice("bad", f"Killed: {GONE}"))
        path = shlex.quote(str(self.path))
        notices += _warn_of_unsigned_plan(snapshot, site, path)
        if snapshot and snapshot.held and not snapshot.over:
            text = "An answer waits until a person here lets it go: fedtune let-go"
            notices.append(Notice("warn", f"{text} {path}"))
        return {
            "site": site,
            "policy": _policy(site),
            "snapshot": snapshot,
            "status": snapshot.status if snapshot else {},
            "counts": _counts(site.site.state / COUNTS),
            "notices": notices,
            "commands": [
                {"does": "Every charge, checked", "line": f"fedtune ledger {path}"},
                {"does": "Who did what here, checked", "line": f"fedtune log {path} --verify"},
                {"does": "The rows that were left out", "line": f"fedtune data report {path}"},
                {"does": "Take part", "line": f"fedtune client {path}"},
            ],
        }

    def series(self) -> dict[str, Any]:
        """Return {"own": a list}: for each of the site's newest studies, its own training loss by
        round, as `_losses` returns it."""
        return {"own": _losses(self._site().site.state / LOSSES)}

    def _site(self) -> Site:
        return load_site(self.path)


def _warn_of_unsigned_plan(snapshot: Snapshot | None, site: Site, path: str) -> Iterable[Notice]:
    """Yield a warning if it is known that nobody at this site has signed the plan of the newest
    study, and this study is not over. path: the site file, quoted for a command line."""
    status = snapshot.status if snapshot else {}
    digest, study = status.get("plan_digest"), status.get("study")
    if snapshot is None or snapshot.over or status.get("signed") is not False or not digest:
        return
    plan = shlex.quote(str(site.site.plan_file(digest)))
    if snapshot.unsigned:
        text = f"The study {study} waits for a person here to sign its plan"
    else:
        rule = f'policy.admission = "{site.policy.admission}"'
        text = f"The study {study} spends from this site's budget by {rule}: nobody here signed it"
    yield Notice("warn", f"{text}: fedtune review {plan} --site {path}")


def _policy(site: Site) -> list[tuple[str, str]]:
    """Return the site's policy as pairs of label and value."""
    policy = site.policy
    return [
        ("policy.max_epsilon", f"{policy.max_epsilon:g}"),
        ("policy.max_fallback_epsilon", f"{policy.max_fallback_epsilon:g}"),
        ("policy.max_delta", f"{policy.max_delta:g}"),
        ("policy.max_epsilon_per_study", f"{policy.max_epsilon_per_study:g}"),
        ("policy.admission", str(policy.admission)),
        ("policy.answers", str(policy.answers)),
        ("policy.min_noise_multiplier", f"{policy.min_noise_multiplier:g}"),
        ("policy.max_sampling_rate", f"{policy.max_sampling_rate:g}"),
        ("site.declared_size", f"{site.site.declared_size:,}"),
        ("unit", "patient" if site.data.columns.patient else "record"),
    ]


def _counts(path: Path) -> list[dict[str, Any]]:
    """Return a dict for each dataset: how many rows were used when the dataset was last read, and
    how many were left out for which reason. The values are counts and fixed words. Return [] if the
    file is missing or damaged. path: counts.json in the site's state folder."""
    if not path.exists():
        return []
    with suppress(FedtuneError):
        tables = reading.json_in(path, "the counts of a reading")
        return [
            _count(name, facts)
            for name, facts in tables.items()
            if NAME.fullmatch(name) and isinstance(facts, dict)
        ]
    return []


def _losses(path: Path) -> list[dict[str, Any]]:
    """Return a dict for each of the newest STUDIES studies, the newest first: "study" is its name,
    "rounds" are the numbers of the rounds, and "losses" has the loss of each round, None if it is
    not known. If a round was trained twice, the later loss counts. Lines that fedtune did not write
    are left out. path: losses.jsonl in the site's state folder."""
    studies: dict[str, dict[str, Any]] = {}
    lines: list[str] = []
    with suppress(OSError, FedtuneError):
        lines = reading.text(path, "losses by round", most=reading.LARGE).splitlines()
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            plan = row["plan"]
            name = row["study"]
            round_ = row["round"]
            if PLAN.fullmatch(plan) and NAME.fullmatch(name) and _is_count(round_):
                study = studies.pop(plan, {"study": name, "losses": {}})
                loss = number(row["loss"])
                study["losses"][round_] = loss if loss is None or math.isfinite(loss) else None
                studies[plan] = study
    newest = list(studies.values())[: -STUDIES - 1 : -1]
    return [
        {"study": one["study"], "rounds": sorted(one["losses"]),
         "losses": [one["losses"][n] for n in sorted(one["losses"])]}
        for one in newest
    ]  # fmt: skip


def _count(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    rejected = facts.get("rejected")
    pairs = rejected.items() if isinstance(rejected, dict) else ()
    counted = {why: n for why, n in pairs if _is_count(n)}
    known = {why: n for why, n in counted.items() if why in REASONS}
    other = sum(counted.values()) - sum(known.values())
    return {
        **{key: value for key, value in facts.items() if _is_count(value)},
        "dataset": name,
        "unit": "patient" if facts.get("unit") == "patient" else "record",
        "time": str(facts.get("time")) if MOMENT.fullmatch(str(facts.get("time"))) else "",
        "rejected": known | ({"for another reason": other} if other else {}),
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
