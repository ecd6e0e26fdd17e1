"""Compare the claims of a coordinator's run about this site with this site's own ledger.

A run proves what its sites signed, but not that nothing is left out: only the site knows what it
released. The coordinator alone vouches for the adapter's bytes and the scores; no site can compare
these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from fedtune.core.config import PrivacyTable, Site, Study
from fedtune.core.config.patient_columns import patient_columns
from fedtune.core.errors import NotGenuine
from fedtune.core.files import reading
from fedtune.core.ledger.entries import Spent
from fedtune.core.ledger.files import DATABASE
from fedtune.core.ledger.ledger import Ledger, signing_key
from fedtune.core.ledger.spending import charges_with_columns, known_epsilon, known_fallback
from fedtune.core.run_folder import load_plan
from fedtune.core.vault.declared import run_ledger
from fedtune.evidence.sign import EVIDENCE, RUN
from fedtune.evidence.verify import Verified
from fedtune.homes.opening import open_ledger


@dataclass(frozen=True)
class Compared:
    """A site's part in a run.

    - name: the name under which the run lists this site's key; "" if it does not list the key
    - rounds: the rounds whose updates are in the run and in this ledger
    - left_out: the rounds whose updates this site released, but which the run does not hold: the
      updates were lost on the way, came too late, or were left out
    - unanswered: the rounds after which this site released a paid answer about its held-out records
      that the run does not hold
    - repeated: round -> how many answers to it this site charged and released, of the rounds with
      more than one. A run holds one of them at most. An honest coordinator asks again, too: after
      it was put back to a backup, if an attempt at a sum of shared noise failed, or if this site
      had lost what it had released
    - stated: this site's ε at the plan's δ as the run states it; None without privacy
    - paid: this site's ε at the plan's δ by its ledger; None without privacy, or if `known` is
      false
    - whatever: if a round shared its noise, the same by this site's own noise alone, which holds
      whatever other sites do; else None
    - known: whether the ledger knows what these rounds cost one unit of this site: a patient if
      site.toml names a column of patients, else a record"""

    name: str
    rounds: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    unanswered: list[int] = field(default_factory=list)
    repeated: dict[int, int] = field(default_factory=dict)
    stated: float | None = None
    paid: float | None = None
    whatever: float | None = None
    known: bool = True


def compare(site: Site, run: Path, found: Verified) -> Compared:
    """Verify this site's ledger, then compare a run with it. If the site's data is declared public
    or generated, the ledger that paid for this run alone is verified and compared. run: the folder
    of the run, or of its dossier. found: the result of verifying the run.

    Errors: NotGenuine if the run has this site's name under another key. NotGenuine too if it has
    an update or an answer under this site's key that this site's ledger did not release: the key
    was stolen, or the ledger was replaced by an older copy."""
    where = run / RUN if (run / RUN / EVIDENCE).exists() else run
    study = load_plan(where)
    home = open_ledger(site.site.ledger or site.home)
    home.verify()
    key, own = signing_key(site, home).public, site.policy.own_memberships
    content = reading.json_in(where / EVIDENCE, "what sites signed of a run", most=reading.LARGE)
    names = {entry["signing"]: name for name, entry in content["sites"].items()}
    name = names.get(key, "")
    if not name and site.site.name in names.values():
        raise NotGenuine(
            f"{run}: a site {site.site.name!r} took part with a key that is not this site's",
            f"{key[:16]}…, this site's signing key",
            "somebody took part in this site's name: tell the coordinator and the other sites",
        )
    book, books = home, [home]
    if site.data.declared and (run_ledger(site, study.digest) / DATABASE).exists():
        book = open_ledger(run_ledger(site, study.digest))  # which paid for this run alone
        book.verify()
        books.append(book)
    spent = [each for each in book.spending() if _is_of(each, study, own)]
    sent = {s.charge.round for s in spent if s.released or not study.private}
    answered = {each.charge.round for each in _answers(books, study, own) if each.released}
    claimed = _require_released(run, content, ("update", name), sent)
    held = _require_released(run, content, ("answer", name), answered)
    paid, whatever, known = None, None, True
    if isinstance(study.privacy, PrivacyTable):
        tables = {table.name for table in (site.data, site.evaluation) if table}
        listed = charges_with_columns(book, tables, patient_columns(site))
        there = {each.number for each in listed}
        charged = [each for each in listed if _is_of(each, study, own)]
        charged += [each for each in spent if each.number not in there]
        unit = "patient" if site.data.columns.patient else "record"
        paid = known_epsilon(charged, study.privacy.delta, unit) if charged else 0.0
        whatever = known_fallback(charged, study.privacy.delta, unit)
        known = paid is not None
    return Compared(
        name=name,
        rounds=sorted(claimed),
        left_out=sorted(sent - claimed),
        unanswered=sorted(answered - held),
        repeated=_count_repeated(spent) if study.private else {},
        stated=found.sites.get(name, {}).get("epsilon"),
        paid=paid,
        whatever=whatever,
        known=known,
    )


def _require_released(
    run: Path, content: dict[str, Any], of: tuple[str, str], released: set[int]
) -> set[int]:
    """Return the rounds of which the run holds this site's update or answer, all of them released
    by its ledger.

    - run: the run's folder, for the error's text
    - content: the content of evidence.json
    - of: "update" or "answer", and the site's name in the run
    - released: the rounds of which the ledger released one

    Errors: NotGenuine if the run holds one that the ledger did not release."""
    held = {each["round"] for each in content["updates"] if (each["kind"], each["site"]) == of}
    if foreign := sorted(held - released):
        kind = of[0]
        raise NotGenuine(
            f"{run}: holds this site's {kind} of round {foreign[0]}, and its ledger released none",
            f"{kind}s that this site released",
            "its signing key is in other hands, or its ledger was put back: freeze it",
        )
    return held


def _answers(
    books: Iterable[Ledger], study: Study, memberships: Collection[str]
) -> Iterator[Spent]:
    """Yield this site's charges for answers to the queries of `study`. books: its ledgers."""
    for each in chain.from_iterable(book.spending() for book in books):
        if each.charge.study == study.queries_digest and each.charge.is_paid_by(memberships):
            yield each


def _count_repeated(spent: Collection[Spent]) -> dict[int, int]:
    """Return round -> the number of its charges whose update was released, for the rounds with more
    than one. What a restore charged does not count: it stands for rounds that may never have been.
    spent: the charges of one study."""
    answers = Counter(s.charge.round for s in spent if s.released and s.kind == "reserve")
    return {number: count for number, count in sorted(answers.items()) if count > 1}


def _is_of(spent: Spent, study: Study, memberships: Collection[str]) -> bool:
    """Return whether a charge is of `study`, and counts as paid by one of `memberships`."""
    return spent.charge.study == study.digest and spent.charge.is_paid_by(memberships)
