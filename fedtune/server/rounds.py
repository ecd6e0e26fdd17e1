"""Run a study: start -> admit -> (train, aggregate, measure, save, query) per round -> report.

Guarantee: a round that fewer than strategy.min_sites sites delivered is never counted. A crash or
Ctrl-C loses at most the round in progress; `resume` continues after the last saved one."""

from __future__ import annotations

import math
import random
import shutil
import time
from contextlib import suppress
from dataclasses import replace as replace_fields
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from fedtune.accounting.update_noise import gain_of_noise
from fedtune.core.config import Study
from fedtune.core.errors import ConfigError, InfrastructureError, Refused
from fedtune.core.models import preconditioner
from fedtune.core.models.rank_slice import rank_slice
from fedtune.core.progress import OnEvent
from fedtune.core.run_folder import ADAPTER, TRAINED, write_plan
from fedtune.core.strategy import Strategy, build_strategy
from fedtune.core.wire import codec, seal
from fedtune.core.wire.arrays import Arrays
from fedtune.evidence.sign import sign
from fedtune.report.figures import duration
from fedtune.report.gain import is_start_released
from fedtune.server import provenance, release, secure_round, step, store, summary
from fedtune.server.admission import NOT_ENROLLED, Outcome, Roster, Tally, outcome, plan_message
from fedtune.server.bound import Limits
from fedtune.server.continuous import Continuous
from fedtune.server.orders import Answer, Order, exchange, tell_finished
from fedtune.server.parts import Dependencies, Measures
from fedtune.server.queries import Queries
from fedtune.server.rank_slices import pad_update, slice_update
from fedtune.server.store import Phase, Progress

RETRIES = 3  # how often a round that too few sites delivered is retried
LARGEST = 4  # a site's declared size counts for at most this many times the median
POLL = 2.0  # seconds between checks for sites that have yet to connect


def run(
    grid: Grid,
    study: Study,
    out: Path,
    *,
    resume: bool = False,
    on_event: OnEvent | None = None,
    parts: Dependencies | None = None,
) -> dict[str, Any]:
    """Run a study from its first to its last round, and return the report's content.

    - grid: the Flower grid whose nodes are the sites
    - study: the study as its study.toml describes it
    - out: the run's folder, in which adapter, report, metrics and checkpoint are written
    - resume: True: continue the run that `out` holds, or begin one if it holds none; False: begin a
      run, for which `out` must hold none
    - on_event: called with each event's kind and data; None for nobody
    - parts: the functions and settings to use; None for the ones that this release defines

    Errors: ConfigError, CheckpointError (exit 2); Refused, if too many sites refused the plan (exit
    3); InfrastructureError, if too few sites answered (exit 4)."""
    parts, on_event = parts or Dependencies(), on_event or (lambda kind, data: None)
    strategy = build_strategy(study)
    progress = store.open_folder(out, study, resume=resume)
    fresh = progress is None
    try:
        if progress is None:
            started = parts.start(study)
            progress = Progress(study.digest, started.study, started.adapter, started.frozen)
            progress.origin = started.adapter if study.selection or study.start else {}
            progress.strategy = started.strategy
        strategy.load_state(progress.strategy)
        strategy.prepare(progress.study, progress.frozen)
        return _Run(grid, out, parts, on_event, strategy, progress).go(fresh)
    except BaseException:
        with suppress(OSError):
            out.rmdir()  # a run that never began leaves no folder; rmdir keeps one that has files
        raise


class TooFew(InfrastructureError):
    """After all retries, fewer than strategy.min_sites sites have delivered a round."""


class _Run:
    """One run, from the admission of the sites to the report.

    - grid: the Flower grid whose nodes are the sites
    - out: the run's folder
    - parts: the functions and settings to use
    - on_event: called with each event's kind and data
    - strategy: the study's strategy, in the state of the newest saved round
    - progress: the state of the run, loaded from `out` or new"""

    def __init__(
        self,
        grid: Grid,
        out: Path,
        parts: Dependencies,
        on_event: OnEvent,
        strategy: Strategy,
        progress: Progress,
    ) -> None:
        self.grid = grid
        self.out = out
        self.parts = parts
        self.on_event = on_event
        self.strategy = strategy
        self.progress = progress
        self.study = progress.study
        self.rounds = self.study.training.rounds  # None: the study runs until somebody stops it
        self.table = self.study.strategy
        self.limits = Limits(self.study, parts.budget)
        self.settings = parts.settings
        self.receipts = store.Receipts(self.settings.receipts)
        self.receipts.read()  # a damaged file ends the run here, before any site is asked
        receipts = progress.receipts.items()  # a resumed simulation signs with a new key
        progress.receipts = {n: r for n, r in receipts if self._is_own(r)}
        self.stored = dict(progress.receipts)
        plan = plan_message(self.study, progress.frozen, self.settings.key)
        store.keep_plan(self.settings.plan, plan)
        self.roster = Roster(
            *(grid, self.study, plan, progress.sizes, progress.keys, self._on_status),
            partial(parts.enrolled, grid) if parts.enrolled else None,
            partial(parts.expect, grid),
            self.settings.turn.pause,
            summary.lora_ranks(progress.history),
            *summary.collect_declarations(progress.history),
        )
        self.queries = Queries(self.progress, self.roster, self.settings.key)
        own = (self.settings, self.limits, strategy, self._receipt, self._save, self._on_status)
        secure = secure_round.of(progress, self.roster, *own, self._weight_cap)
        self.train = secure or self._train
        self.continuous = self._evaluator = None
        self._decision: dict[str, Any] = {}
        if self.study.continuous:
            self.continuous = Continuous(out, progress, parts, self._event)
        elif self.study.evaluation:
            self._evaluator = parts.evaluator(self.study, progress.frozen)
        chosen_on = step.replace_evaluation(self.study) if self.study.selection else None
        self._selector = parts.evaluator(chosen_on, progress.frozen) if chosen_on else None

    @property
    def _step_chooser(self) -> Measures | None:
        """The evaluator that measures adapters on the selection records, by which the run chooses
        how far a round moves the adapter. It is None if the run makes no such choice: the plan has
        no [selection], the strategy builds a head from class statistics, or the selection records
        lack a class that the plan names, so that they would reject every step that learns this
        class."""
        selector = self._selector
        if selector is None or self.strategy.of_statistics or selector.lacking:
            return None
        return selector

    @property
    def evaluator(self) -> Measures | None:
        return self.continuous.evaluator if self.continuous else self._evaluator

    def go(self, fresh: bool) -> dict[str, Any]:
        done = self.progress.round
        self._event("start", study=self.study.study.name, plan_digest=self.study.digest, done=done)
        if not self._is_over:
            self._admit()
            self._event("planned", **summary.describe_plan(self.progress, self.roster, self.parts))
        if fresh:
            self._forecast_gain()
        write_plan(self.out, self.study)
        if fresh:
            summary.measure_start(self.progress, self.evaluator)
            self._save()
        if self.queries.is_due():  # the run was interrupted between a round and its query
            self.roster.join()
            self._query()
        store.write_metrics(self.out, self.progress.history)
        if self.continuous:
            self.continuous.begin()
        while not self._is_over:
            self.settings.turn.pass_on()
            self._next(self.progress.round + 1)
        if self.rounds and self.progress.round < self.rounds:
            text = f"ended after round {self.progress.round}: no step lowers the selection loss"
            self._event("step", text=text)
        if self.rounds:
            tell_finished(self.roster, self.settings.key)
        return self._finish()

    def _forecast_gain(self) -> None:
        """Report how much the sites' records are expected to add to what public records give,
        before any ε is spent. Do nothing if this cannot be forecast.

        Errors: ConfigError if the records are expected to add nothing, and the data of a site is
        private; no error if settings.anyway is set."""
        sizes, records = self.progress.sizes, len(self._evaluator) if self._evaluator else 0
        names = self.roster.list_willing()
        shares, known = self.settings.shares, self.progress.strategy
        expected = self.parts.expected(
            self.study, known, [sizes[name] for name in names], shares, records
        )
        if expected is None:
            return
        self.progress.expected = expected.as_dict()
        private = not all(self.roster.declared.get(name) for name in names)
        if expected.is_none and private and not self.settings.anyway:
            raise ConfigError(
                "; ".join(expected.lines()),
                "a study to which its sites' records can add something",
                "change the study, so that no ε is spent for nothing; to run it as it is, give "
                "--anyway to `fedtune server` or `fedtune simulate`",
            )
        for line in expected.lines():
            loud = "WARNING: " if line == expected.warning else ""
            self._event("records", name="coordinator", text=loud + line)

    @property
    def _is_over(self) -> bool:
        last = self.settings.upto if self.continuous else self.rounds
        done = last is not None and self.progress.round >= last
        return done or not step.steps_left(self.study, self.progress.history)

    def _next(self, number: int) -> None:
        """Run round `number`. In a continuous study, first wait for the start of the round's slot,
        and afterwards judge the new adapter and write the report. If too few sites deliver the
        round, TooFew is raised; but a continuous study with settings.skip leaves the round out."""
        if self.continuous is None:
            return self._round(number)
        self.continuous.wait()
        try:
            self._round(number)
        except TooFew as error:
            if not self.settings.skip:
                raise
            self.strategy = build_strategy(self.study)  # drops the updates that some sites sent
            self.strategy.load_state(self.progress.strategy)
            self.strategy.prepare(self.study, self.progress.frozen)
            self._event("step", text=str(error))
            return
        self.continuous.judge()
        self._publish()

    def _admit(self) -> None:
        """Wait until strategy.min_sites sites have admitted the plan. Sites have settings.patience
        seconds to connect; there is no limit if settings.waits is set and no site has refused.
        People at the sites have settings.signing seconds to sign the plan. Errors: Refused if too
        few sites are left because of refusals or missing signatures; InfrastructureError if too few
        connect in time."""
        began, told, waits = time.monotonic(), set[str](), False
        while True:
            late = time.monotonic() - began >= self.settings.patience
            is_last = late and (bool(self.roster.refused) or not self.settings.waits)
            self.roster.join(waits=waits and not is_last)
            if len(self.roster.list_willing()) >= self.table.min_sites:
                return
            if late and self.roster.refused:
                self.roster.raise_if_refused()
            if self.roster.waiting:
                if self.roster.longest_wait >= self.settings.signing:
                    raise self.roster.too_few(Refused)
                told = self._tell_waiting(told)
            elif late and (self.roster.refused or not self.settings.waits):
                raise self.roster.too_few(InfrastructureError)
            waits = True
            self.settings.turn.pause(min(POLL, self.settings.patience))

    def _tell_waiting(self, told: set[str]) -> set[str]:
        """Report which sites wait for a person to sign the plan, and return their names. told: the
        names that were reported last; if the same sites still wait, nothing is reported."""
        names = set(self.roster.waiting)
        if names != told:
            self._event(
                "step",
                text=f"waiting for people at {', '.join(sorted(names))} to sign the plan, for up "
                f"to {self.settings.signing / 86_400:.3g} days; once they have, the run goes on",
            )
        return names

    def _round(self, number: int) -> None:
        self._event("begin", round=number)
        tally, least = Tally(number), self.table.min_sites
        waits = self.settings.waits and not self.continuous  # which goes on with its next slot
        seconds = self.table.round_timeout if waits else 0.0
        for attempt in range(1 + RETRIES):
            if attempt:
                self.settings.turn.pause(self.settings.pause * attempt)
            if not self._gather(tally.number, {*tally.participants}, seconds):
                if waits:
                    break  # they had time enough
                continue  # too few sites for the round to count, so none is charged for it
            if self.progress.phase is not Phase.ASKED:
                self._enter(Phase.ASKED)
            self.train(self._choose(tally), tally)
            if len(tally.participants) >= least:
                return self._keep(tally)
        self.roster.raise_if_refused()
        tally.missing = self.roster.out() | tally.missing
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(tally.missing.items()))
        raise TooFew(
            f"round {number}: {len(tally.participants)} sites delivered after {attempt} retries "
            f"({reasons or 'nobody could be asked'})",
            f"at least strategy.min_sites = {self.table.min_sites}",
            f"check these sites; --resume continues after round {number - 1}",
        )

    def _gather(self, number: int, delivered: set[str], seconds: float) -> bool:
        """Wait until enough sites can be asked for the round to count, for instance after the
        network was cut, and report for whom the round waits. Return whether there are enough.

        - number: the round
        - delivered: the sites whose update of the round is counted already
        - seconds: how long to wait at most; 0 not to wait

        Errors: Refused if too few sites are left because of refusals."""
        began, told, waits = time.monotonic(), dict[str, str](), False
        while True:
            left = seconds - (time.monotonic() - began)
            self.roster.join(waits=waits and left > 0)
            self.roster.raise_if_refused()
            if len({*self.roster.list_willing(), *delivered}) >= self.table.min_sites:
                return True
            if left <= 0:
                return False
            if (out := self.roster.out()) != told:
                told = out
                who = "; ".join(f"{name}: {why}" for name, why in out.items()) or "nobody is there"
                text = f"too few sites for round {number} ({who}); the run waits up to"
                self._event("step", text=f"{text} {duration(left)} and goes on by itself")
            waits = True
            self.settings.turn.pause(min(POLL, self.settings.patience))

    def _choose(self, tally: Tally) -> list[str]:
        """Draw, with the plan's seed, the names of the sites that are asked next, among the willing
        sites whose update of this round is not counted yet. On a retry, prefer sites that have not
        failed. The draw is public, so it amplifies no site's privacy."""
        willing = self.roster.list_willing()
        target = max(self.table.min_sites, math.ceil(self.table.fraction * len(willing) - 1e-9))
        seed = f"{self.study.study.seed}:{tally.number}"
        order = random.Random(seed).sample(willing, len(willing))
        remaining = [name for name in order if name not in tally.participants]
        remaining.sort(key=lambda name: tally.failures[name])
        return remaining[: max(target - len(tally.participants), 0)]

    def _train(self, names: list[str], tally: Tally) -> None:
        """Order the sites `names` to train, and count each update as it arrives.

        The sites train from the adapter as encoded for the wire. Their updates are applied to the
        unrounded fp32 adapter here, so that rounding errors do not accumulate over rounds."""
        wire = self.study.wire
        adapter = self.progress.adapter
        number = tally.number
        agreed = codec.layout(codec.shapes(self.strategy.update_like(adapter)), wire.update)
        arrays = sum(form.nbytes for form in agreed.values())
        order = Order("train", self.study.digest, number, str(number), self._receipt, arrays)
        start = codec.length(adapter) * codec.GROWTH[wire.adapter]
        take = partial(self._take, tally, start)
        exchange(self.progress, self.roster, self.settings.key, names, order, take)

    def _receipt(self, name: str) -> dict[str, Any] | None:
        """Return a site's newest receipt that is signed with this run's key; None if there is none.
        It may come from this run or from another study of the coordinator."""
        newest = self.receipts.read().get(self.progress.keys.get(name, ""), {})
        return newest if self._is_own(newest) else self.progress.receipts.get(name)

    def _is_own(self, receipt: dict[str, Any]) -> bool:
        """Return whether a receipt is signed with this run's key, since a site accepts no receipt
        that another key signed."""
        return receipt.get("coordinator") == self.settings.key.public

    def _take(self, tally: Tally, start: float, answer: Answer) -> str:
        """Check a site's reply to an order to train, and return the reply's status. An update that
        counts is added to the round's mean. If an update of this site is counted already, the reply
        is dropped.

        - tally: the updates of the round so far
        - start: an upper bound on the norm of the adapter that was sent
        - answer: the reply, with the context that its seal must state"""
        name, reply = answer.name, answer.reply
        self.roster.down[name] += answer.sent
        self.roster.up[name] += reply.size
        if tally.has(self.study.digest, name):
            reason = "its update of this round is counted already"
            self._on_status(name, "dropped", reason, tally.number)
            return "dropped"
        before = self.progress.events.get(name, [])
        whole = self.strategy.update_like(self.progress.adapter)
        key = self.progress.keys.get(name, "")
        columns = rank_slice(self.study.lora, self.roster.lora_ranks.get(name), tally.number)
        part = slice_update(whole, columns)
        try:
            dimension = sum(array.size for array in part.values())
            done = self.progress.round if self.continuous else None
            limits = self.limits.of(self.progress.sizes[name], dimension, start, done)
            limits["encoding"] = self.study.wire.update
            result = outcome(
                reply, part, self.study.private, before, key, answer.expected, **limits
            )
        except ConfigError as error:  # an honest site of this size would refuse the plan
            result = Outcome("dropped", f"its declared size does not fit the plan: {error}")
        if result.status == "trained" and self.roster.is_stranger(reply.node, name):
            result = Outcome("refused", NOT_ENROLLED)
        if result.status == "trained":
            self.progress.receipts[name] = seal.receipt(self.settings.key, result.ledger)
            declared = self.progress.sizes[name] if self.table.weights == "declared" else 1
            weight = min(declared, self._weight_cap(tally))
            if weight < declared:
                tally.weights[name] = weight
                result = replace_fields(result, reason=self._cap_reason(name, weight, declared))
            self.strategy.add(pad_update(result.update, whole, columns), float(weight))
            self.progress.events[name] = result.events
            tally.count(self.study.digest, name, result.evidence)
        else:
            tally.failures[name] += result.status != "unprepared"
            if tally.note_missing(name, result):  # a person's approval is awaited, as before
                return result.status
            if result.status == "refused":
                self.roster.refused[name] = result.reason
        self._on_status(name, result.status, result.reason, tally.number)
        return result.status

    def _weight_cap(self, tally: Tally) -> int:
        """Return the largest weight in the mean that a site may have, whatever size it declares:
        LARGEST times the median of the willing sites' declared sizes. It is computed once in a
        round."""
        if not tally.largest:
            sizes = self.progress.sizes
            tally.largest = LARGEST * median_low(sizes[name] for name in self.roster.list_willing())
        return tally.largest

    def _cap_reason(self, name: str, weight: int, declared: int) -> str:
        reported = any(name in entry.get("weights", {}) for entry in self.progress.history)
        return "" if reported else summary.describe_cap(weight, declared)

    def _keep(self, tally: Tally) -> None:
        """Finish a round: move the adapter by the mean update, measure the adapter, and save the
        checkpoint. Then, if the plan has a query after this round, make the query."""
        progress = self.progress
        number = tally.number
        roster = self.roster
        self.strategy.describe_round(*self._noise_of_mean(tally))
        adapter = preconditioner.step_adapter(
            self.strategy.apply, progress.adapter, progress.frozen
        )
        if not all(np.isfinite(array).all() for array in adapter.values()):
            raise InfrastructureError(
                f"round {number}: the adapter after this round is not finite", "finite numbers"
            )
        extra: dict[str, Any] = {}
        if (chooser := self._step_chooser) is not None:
            adapter, extra = step.choose(chooser, progress, adapter)
        progress.adapter, progress.round = adapter, number
        progress.strategy = self.strategy.state()
        entry: dict[str, Any] = {
            "round": number,
            "rounds": self.rounds,
            "private": self.study.private,
            "participants": sorted(tally.participants),
            "missing": roster.out() | tally.missing,
            "late": dict(sorted(tally.late.items())),
            **(extra | summary.statements(roster.declared, roster.free_query, tally.participants)),
            "evidence": tally.evidence,
            "quality": {},
            "epsilon": summary.epsilons(progress, self.parts),
            "bytes_up": dict(sorted(roster.up.items())),
            "bytes_down": dict(sorted(roster.down.items())),
            **provenance.clock_round(tally.started),
        }
        if ranks := roster.lora_ranks:  # empty where the plan leaves sites no choice
            entry["lora_ranks"] = {name: ranks[name] for name in sorted(tally.participants)}
        if tally.weights:
            entry["weights"] = dict(sorted(tally.weights.items()))
        if self.continuous:
            entry["slot"] = self.continuous.slot
        roster.up.clear()
        roster.down.clear()
        progress.history.append(entry)
        entry["quality"] = self._measure(number)
        self._enter(Phase.KEPT)
        if self.queries.is_due():
            self._query()
        store.write_metrics(self.out, progress.history)
        moved = sum(entry["bytes_up"].values()) + sum(entry["bytes_down"].values())
        self._event("round", **store.figures(entry), bytes=moved)

    def _noise_of_mean(self, tally: Tally) -> tuple[float, float]:
        """Return the number of declared units in the round's mean update, and the standard
        deviation of the noise in each of its numbers, for `Strategy.describe_round`. Both follow
        from the plan and the sites' declarations. tally: the updates of the round."""
        sizes = [self.progress.sizes[name] for name in tally.participants]
        weights = units = [min(size, self._weight_cap(tally)) for size in sizes]
        if self.table.weights == "equal" and not self.study.secure_aggregation:
            weights = [1] * len(sizes)
        # A site's own mean is its sum over its declared size, and counts with its weight. With
        # secure aggregation the sites' sums are added up and divided by the total weight.
        summed = weights if self.study.secure_aggregation else sizes
        noise = [self.limits.deviation(size) * size for size in sizes]  # noise in each site's sum
        shares = (d * w / n for d, w, n in zip(noise, weights, summed, strict=True))
        of_gradient = math.hypot(*shares) / sum(weights)
        return sum(units), of_gradient * gain_of_noise(self.study, tally.number)

    def _query(self) -> None:
        """Query the sites' held-out records about the newest round (private evaluation), and save
        the pooled answer. If the coordinator repeats the query after a crash, the sites send the
        same answers again, without a new charge."""
        answer = self.queries.ask()
        self._enter(Phase.QUERIED)
        for name, why in answer["missing"].items():
            status, _, reason = why.partition(": ")
            self._event("site", name=name, status=status, reason=f"private evaluation: {reason}")

    def _enter(self, phase: Phase) -> None:
        self.progress.enter(phase)
        self._save()

    def _save(self) -> None:
        progress = self.progress
        store.save(self.out, progress)
        receipts = progress.receipts.items()
        new = {progress.keys[n]: r for n, r in receipts if r != self.stored.get(n)}
        # Only the changed receipts: another study may have stored newer ones of the other sites.
        self.receipts.keep(new)
        self.stored = dict(receipts)

    def _measure(self, number: int) -> dict[str, float]:
        """Measure the adapter on the [evaluation] records, and return metric -> value; {} if no
        measurement is due after round `number`. A plan with [selection] makes its choices on the
        selection records, and needs the evaluation only after the last round."""
        table = self.study.evaluation
        every = 0 if self.study.selection else table.every if table else 0
        last = self.continuous is None and self._is_over
        due = last or bool(every and number % every == 0)
        if not due or (evaluator := self.evaluator) is None:
            return {}
        return evaluator.follow(self.progress.adapter)

    def _finish(self) -> dict[str, Any]:
        if not self.continuous:  # a continuous study has released its adapters already
            self._decision = release.decide(
                self.progress, self._selector, self.strategy.class_figures()
            )
            starts = is_start_released({"released": self._decision})
            if starts:  # keep the trained adapter too, since ε was spent on it
                self._write(self.progress.adapter, TRAINED)
                self._event("step", text=f"{self._decision['why']}: the start is released")
            self._write(self.progress.origin if starts else self.progress.adapter, ADAPTER)
        report = self._publish()
        if not self.continuous:  # a continuous study may be resumed
            self._enter(Phase.FINISHED)
        self._event("done", out=str(self.out), privacy=report["privacy"], quality=report["quality"])
        return report

    def _write(self, adapter: Arrays, name: str) -> None:
        """Write an adapter to the folder `name` in the run's folder. The files are written to a
        draft folder first, which is then renamed, so that the folder `name` is never incomplete."""
        folder, draft = self.out / name, self.out / f"{name}.new"
        shutil.rmtree(draft, ignore_errors=True)
        self.parts.save(self.study, adapter, self.progress.frozen, draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)

    def _publish(self) -> dict[str, Any]:
        """Write the report, and sign it together with the adapter and the sites' signed evidence.
        Return the report's content."""
        own, ran = self.settings, self.progress
        self.parts.report(self.out, report := self._report())
        sign(self.out, ran.study, own.key, own.ca, ran.keys, own.registry(), ran.history)
        return report

    def _report(self) -> dict[str, Any]:
        report = summary.report(self.progress, self.parts)
        if not self.settings.ca:  # a run without a CA is a simulation, also to `fedtune verify`
            report["simulation"] = True
        if self._evaluator:
            report["quality"] |= summary.judge_adapter(
                self.progress, self._evaluator, self._selector
            )
        if self._decision:
            report["quality"]["released"] = self._decision
        if self._evaluator and is_start_released(report["quality"]):
            quality = report["quality"]
            report["quality"] = summary.with_start_released(quality, self.progress, self._evaluator)
        if not self.continuous:
            starts = is_start_released(report["quality"])
            released = self.progress.origin if starts else self.progress.adapter
            said = self.strategy.class_figures()
            if rows := summary.classes(self.progress, self._evaluator, said, released):
                report["quality"]["classes"] = rows
        if self.continuous:
            report |= {"continuous": self.continuous.report()}
            report["quality"] = {**report["quality"], **self.continuous.quality()}
        return report

    def _on_status(self, name: str, status: str, reason: str, round_: int | None = None) -> None:
        """Report a site's status in an event "site".

        - name: the site
        - status: the status of its reply, such as "admitted", "trained" or "dropped"
        - reason: why the reply does not count, or how its weight was capped; "" if neither
        - round_: the round to which the reply belongs. None stands for an answer to the plan; such
          an answer is also noted in progress.admission, unless the site failed to answer"""
        if round_ is None and status != "failed":
            suffix = "" if status == "admitted" else f": {reason}"
            self.progress.admission[name] = status + suffix
        number = round_ or self.progress.round + 1
        self._event("site", name=name, status=status, reason=reason, round=number)

    def _event(self, kind: str, **data: Any) -> None:
        self.on_event(kind, {"private": self.study.private, "rounds": self.rounds, **data})
