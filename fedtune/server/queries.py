"""Query the sites' held-out records about a round (private evaluation), and pool the answers.

Each site sends two noised sums over its units, Σ score and Σ 1, and two more for each class and
group that the plan names; it sends no other number. Any number of sites may answer, and an error
in a query never stops a run."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from fedtune.accounting.query_noise import answer_sd
from fedtune.core.wire import seal
from fedtune.core.wire.arrays import Arrays
from fedtune.core.wire.keys import SigningKey
from fedtune.report.held_out import make_table
from fedtune.server.admission import Outcome, Roster, outcome
from fedtune.server.bound import Terms
from fedtune.server.orders import Answer, Order, exchange
from fedtune.server.store import Phase, Progress


class Queries:
    """Asks the sites the queries of one run about their held-out records, and stores the pooled
    answer in the newest entry of the run's history.

    - progress: the run's state
    - roster: the sites of the run
    - key: the coordinator's signing key"""

    def __init__(self, progress: Progress, roster: Roster, key: SigningKey) -> None:
        self.progress = progress
        self.roster = roster
        self.key = key
        self.study = progress.study

    def is_due(self) -> bool:
        """Return whether the plan asks for a query after the newest saved round, and this query was
        not made yet."""
        return self.progress.phase is Phase.KEPT and self.progress.round in self.study.queries

    def ask(self) -> dict[str, Any]:
        """Ask every willing site about the newest adapter and return the pooled answer.

        The entries of the answer:
        - "likelihood" or "accuracy", whichever score the plan names: the mean score; None if no
          site answered or the noise is too large
        - noise_sd: the standard deviation of that mean's noise; None if the mean is None
        - sites: the sites that answered
        - missing: site -> the reason why it did not answer
        - table, if any site answered: the figures by class, group and site

        Errors: InfrastructureError if Flower's Grid fails."""
        entry, missing = self.progress.history[-1], self.roster.out()
        answers: dict[str, Outcome] = {}
        number = self.progress.round
        order = Order(
            "query.evaluate",
            self.study.queries_digest,
            number,
            f"query {number}",
            self.progress.receipts.get,
        )
        take = partial(self._take, entry, answers, missing)
        exchange(self.progress, self.roster, self.key, self.roster.list_willing(), order, take)
        for name, answer in answers.items():
            self.progress.queries[name] = answer.events
            self.progress.receipts[name] = seal.receipt(self.key, answer.ledger)
            entry.setdefault("query_evidence", {})[name] = answer.evidence
        pool = pool_answers(answers.values(), self.score) | {
            "sites": sorted(answers),
            "missing": missing,
        }
        if answers:
            pool["table"] = self._table(answers)
        entry["private_quality"] = pool
        return pool

    def _take(
        self,
        entry: dict[str, Any],
        answers: dict[str, Outcome],
        missing: dict[str, str],
        answer: Answer,
    ) -> str:
        """Check one site's reply to the query, enter it in `answers` or `missing`, and return its
        status ("answered" if it counts).

        - entry: the newest entry of the run's history, whose counts of bytes are raised
        - answers: site -> its checked answer, to which this site's answer is added
        - missing: site -> the reason why it did not answer, to which the reason is added if this
          reply does not count
        - answer: the reply, with the context that its seal must state"""
        name, reply = answer.name, answer.reply
        _add(entry["bytes_down"], name, answer.sent)
        _add(entry["bytes_up"], name, reply.size)
        before = self.progress.queries.get(name, [])
        key = self.progress.keys.get(name, "")
        kind: dict[str, Any] = {"record": "answer", "done": "answered", "terms": self.terms}
        like: Arrays = {"sums": np.zeros(2 * len(self.study.query_cells), np.float32)}
        checked = outcome(reply, like, True, before, key, answer.expected, **kind)
        if checked.status == "answered":
            answers[name] = checked
            missing.pop(name, None)
        else:
            missing[name] = f"{checked.status}: {checked.reason}"
        return checked.status

    def _table(self, answers: dict[str, Outcome]) -> dict[str, Any]:
        """Build the table of the sites' answers by class, group and site. With secure aggregation
        the table has no rows of single sites. answers: site -> its checked answer."""
        sums = {name: answer.update["sums"].astype(np.float64) for name, answer in answers.items()}
        variances = {name: _variance(answer.events) for name, answer in answers.items()}
        shown = {"": np.sum([*sums.values()], axis=0)}
        if self.study.secure_aggregation is None:
            shown |= sums
        variances[""] = sum(variances.values())
        return make_table(
            self.score,
            self.study.query_cells,
            {name: values.tolist() for name, values in shown.items()},
            variances,
        )

    @property
    def score(self) -> str:
        """The name of the score that a unit gets: likelihood or accuracy."""
        table = self.study.private_evaluation
        return "likelihood" if table is None else table.score

    @property
    def terms(self) -> Terms | None:
        """The plan's requirements for an answer's noise; None if the plan has no queries."""
        table = self.study.private_evaluation
        if table is None:
            return None
        steps = len(self.study.queries)
        return Terms(
            sampling_rate=1.0,
            noise_multiplier=table.noise_multiplier,
            max_grad_norm=self.study.query_norm,
            records=1,
            steps=steps,
            divisor=1.0,
        )


def pool_answers(answers: Iterable[Outcome], score: str = "likelihood") -> dict[str, float | None]:
    """Compute the mean score over all units of all sites from the sites' noised answers. Return
    {score: this mean, "noise_sd": the standard deviation of its noise}, where `score` is the name
    of the plan's score.

    The mean is the ratio r = Σ score / n, where n is the pooled count. The noise of both sums has
    variance v. noise_sd is √(v · (1 + r²)) / n, to first order (delta method), and does not include
    the sampling error of the records.

    | case                                                                | result           |
    | no site answered, or n is at most TOO_NOISY standard deviations of  | both are None    |
    | its noise                                                           |                  |
    | the noise puts the ratio outside [0, 1]                             | the mean is the  |
    |                                                                     | nearer bound     |"""
    total, variance = np.zeros(2), 0.0
    for answer in answers:
        total += answer.update["sums"][:2].astype(np.float64)
        variance += _variance(answer.events)
    count = float(total[1])
    ratio = float(total[0]) / count if count > 0 else 0.0
    deviation = answer_sd(variance, count, ratio)
    if deviation is None:
        return {score: None, "noise_sd": None}
    return {score: min(max(ratio, 0.0), 1.0), "noise_sd": deviation}


def _variance(events: list[dict[str, Any]]) -> float:
    """Compute the variance of the noise in one number of an answer, (σC)², from the site's step
    log. events: that step log."""
    return float(max((e["sigma"] * e["max_grad_norm"]) ** 2 for e in events))


def _add(counts: dict[str, int], name: str, more: int) -> None:
    counts[name] = counts.get(name, 0) + more
