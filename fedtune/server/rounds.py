"""A run, step by step: start -> admit -> (ask, aggregate, measure, keep, query) each -> report.

Guarantee: a round that fewer than strategy.min_sites delivered is never counted; a crash or Ctrl-C
loses at most the round in progress, and `resume` goes on from there.
"""

from __future__ import annotations

import json
import math
import random
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import replace as replace_fields
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedtune import strategies
from fedtune.config import Study
from fedtune.errors import ConfigError, InfrastructureError
from fedtune.files.writing import replace
from fedtune.flower.arrays import to_record
from fedtune.models.rank_slice import pad_update, rank_slice, slice_update
from fedtune.progress import OnEvent
from fedtune.server import store, summary
from fedtune.server.admission import NOT_ENROLLED, Outcome, Roster, Tally, outcome, plan_message
from fedtune.server.bound import Limits
from fedtune.server.continuous import Continuous
from fedtune.server.exchange import Reply, size
from fedtune.server.parts import Dependencies, Measures
from fedtune.server.queries import Queries
from fedtune.server.store import Phase, Progress
from fedtune.wire import codec, seal

RETRIES = 3  # of a round that too few sites delivered
LARGEST = 4  # times the median declared size: what a larger one counts for
POLL = 2.0  # seconds between looks for sites that have yet to connect


def run(
    grid: Grid,
    study: Study,
    out: Path,
    *,
    resume: bool = False,
    on_event: OnEvent | None = None,
    parts: Dependencies | None = None,
) -> dict[str, Any]:
    """Run `study` over the nodes of `grid`, write all to `out`; returns the report's body.

    Errors: ConfigError, CheckpointError (exit 2); Refused, where the sites said no (exit 3);
    InfrastructureError, where they did not answer (exit 4)."""
    parts, on_event = parts or Dependencies(), on_event or (lambda kind, data: None)
    strategy = strategies.build(study)
    progress = store.open_folder(out, study, resume=resume)
    fresh = progress is None
    try:
        if progress is None:
            started = parts.start(study)
            progress = Progress(study.digest, started.study, started.adapter, started.frozen)
        strategy.load_state(progress.strategy)
        return _Run(grid, out, parts, on_event, strategy, progress).go(fresh)
    except BaseException:
        with suppress(OSError):
            out.rmdir()  # a run that never began leaves nothing; a folder in use is not removed
        raise


class TooFew(InfrastructureError):
    """A round that fewer than strategy.min_sites delivered, whatever was tried."""


class _Run:
    def __init__(
        self,
        grid: Grid,
        out: Path,
        parts: Dependencies,
        on_event: OnEvent,
        strategy: strategies.Strategy,
        progress: Progress,
    ) -> None:
        self.grid, self.out, self.parts, self.on_event = grid, out, parts, on_event
        self.strategy, self.progress, self.study = strategy, progress, progress.study
        self.rounds = self.study.training.rounds  # None: it goes on until somebody stops it
        self.asks = self.study.strategy
        self.limits = Limits(self.study, parts.budget)
        self.receipts = store.Receipts(parts.receipts)
        mine = parts.key.public  # a site takes a receipt for what it is only from who signed it
        earlier = self.receipts.read().items()
        self.earlier = {k: r for k, r in earlier if r.get("coordinator") == mine}
        kept = progress.receipts.items()  # a simulation that is resumed has another key
        progress.receipts = {n: r for n, r in kept if r.get("coordinator") == mine}
        plan = plan_message(self.study, progress.frozen, parts.key)
        self.roster = Roster(
            *(grid, self.study, plan, progress.sizes, progress.keys, self._tell),
            partial(parts.enrolled, grid) if parts.enrolled else None,
            partial(parts.expect, grid),
            summary.lora_ranks(progress.history),
        )
        self.queries = Queries(self.progress, self.roster, parts.key)
        goes_on = self.study.continuous
        self.continuous = Continuous(out, progress, parts, self._event) if goes_on else None
        own = self.study.evaluation and not self.continuous
        self._evaluator = parts.evaluator(self.study, progress.frozen) if own else None

    @property
    def evaluator(self) -> Measures | None:
        return self.continuous.evaluator if self.continuous else self._evaluator

    def go(self, fresh: bool) -> dict[str, Any]:
        done = self.progress.round
        self._event("start", study=self.study.study.name, plan_digest=self.study.digest, done=done)
        if not self._over:
            self._admit()
        plan = self.study.model_dump_json(indent=2) + "\n"
        replace(self.out / "plan.json", plan.encode())
        if fresh:
            if self.evaluator:
                self.progress.before = self.evaluator.measure(None)
            self._save()
        if self.queries.due():  # the run broke off between a round and the query after it
            self.roster.join()
            self._query()
        self._write_metrics()
        if self.continuous:
            self.continuous.begin()
        while not self._over:
            self._next(self.progress.round + 1)
        return self._finish()

    @property
    def _over(self) -> bool:
        last = self.parts.upto if self.continuous else self.rounds
        return last is not None and self.progress.round >= last

    def _next(self, number: int) -> None:
        """One round; where there is a schedule, in its time, and one that fails is left out."""
        if self.continuous is None:
            return self._round(number)
        self.continuous.wait()
        try:
            self._round(number)
        except TooFew as error:
            if not self.parts.skip:
                raise
            self.strategy = strategies.build(self.study)  # less what some delivered
            self.strategy.load_state(self.progress.strategy)
            self._event("step", text=str(error))
            return
        self.continuous.judge()
        self.parts.report(self.out, self._body())

    def _admit(self) -> None:
        """Errors: Refused or InfrastructureError where fewer than min_sites admit the plan."""
        deadline = time.monotonic() + self.parts.patience
        while True:
            self.roster.join()
            if len(self.roster.willing()) >= self.asks.min_sites:
                return
            if time.monotonic() >= deadline:
                self.roster.raise_if_refused()
                raise self.roster.too_few(InfrastructureError)
            time.sleep(min(POLL, self.parts.patience))

    def _round(self, number: int) -> None:
        tally = Tally(number)
        least = self.asks.min_sites
        for attempt in range(1 + RETRIES):
            if attempt:
                time.sleep(self.parts.pause * attempt)
            self.roster.join()
            self.roster.raise_if_refused()
            if len({*self.roster.willing(), *tally.participants}) < least:
                continue  # nobody spends budget on a round that cannot count
            if self.progress.phase is not Phase.ASKED:
                self._enter(Phase.ASKED)
            self._train(self._choose(tally), tally)
            if len(tally.participants) >= least:
                return self._keep(tally)
        self.roster.raise_if_refused()
        tally.missing = self.roster.out() | tally.missing
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(tally.missing.items()))
        raise TooFew(
            f"round {number}: {len(tally.participants)} sites delivered after {RETRIES} retries "
            f"({reasons or 'nobody could be asked'})",
            f"at least strategy.min_sites = {self.asks.min_sites}",
            f"see to these sites, then --resume goes on after round {number - 1}",
        )

    def _choose(self, tally: Tally) -> list[str]:
        """The sites to ask now: a share of the willing, drawn from the public seed; on a retry,
        first those that did not fail. A public draw: it never counts as amplification."""
        willing = self.roster.willing()
        target = max(self.asks.min_sites, math.ceil(self.asks.fraction * len(willing) - 1e-9))
        seed = f"{self.study.study.seed}:{tally.number}"
        order = random.Random(seed).sample(willing, len(willing))
        left = [name for name in order if name not in tally.participants]
        left.sort(key=lambda name: tally.failures[name])
        return left[: max(target - len(tally.participants), 0)]

    def _train(self, names: list[str], tally: Tally, again: bool = True) -> None:
        """Ask `names` for an update and take each in as it arrives.

        The sites train from the adapter as it was sent; their updates move the one that is kept
        here, in fp32. So what rounding takes from an adapter is there again in the next."""
        encoding = self.study.wire.adapter
        adapter = to_record(codec.encode(self.progress.adapter, encoding))
        start = codec.length(self.progress.adapter) * codec.GROWTH[encoding]
        nonce = secrets.token_hex(16)
        named = {self.roster.nodes[name]: name for name in names}
        contents = {
            node: RecordDict({"order": self._order(name, tally.number, nonce), "adapter": adapter})
            for node, name in named.items()
        }
        unprepared, shared = [], size(RecordDict({"adapter": adapter}))
        agreed = codec.layout(codec.shapes(self.progress.adapter), self.study.wire.update)
        arrays = sum(form.nbytes for form in agreed.values())
        for reply in self.roster.ask("train", contents, str(tally.number), arrays):
            name, order = named[reply.node], contents[reply.node]["order"]
            self.roster.down[name] += shared + size(RecordDict({"order": order}))
            self.roster.up[name] += reply.size
            if self._take(name, reply, tally, nonce, start) == "unprepared":
                unprepared.append(name)
        if unprepared and again:
            self.roster.prepare(self.roster.nodes[name] for name in unprepared)
            ready = [name for name in unprepared if name in self.roster.willing()]
            self._train(ready, tally, again=False)

    def _order(self, name: str, number: int, nonce: str) -> ConfigRecord:
        earlier = self.earlier.get(self.progress.keys.get(name, ""))
        receipt = self.progress.receipts.get(name, earlier)
        text = json.dumps(receipt) if receipt else ""
        return ConfigRecord(seal.order(self.parts.key, self.study.digest, number, nonce, text))

    def _take(self, name: str, reply: Reply, tally: Tally, nonce: str, start: float) -> str:
        """start: how long the adapter may be that the site was given."""
        if tally.has(self.study.digest, name):
            self._tell(name, "dropped", "its update of this round is counted already", tally.number)
            return "dropped"
        before = sum(event["steps"] for event in self.progress.events.get(name, []))
        wanted = seal.Header(
            plan=self.study.digest,
            round=tally.number,
            base=self.study.base.digest or "",
            site=name,
            receiver=self.parts.key.public,
            nonce=nonce,
            body="",
            ledger={},
        )
        adapter, key = self.progress.adapter, self.progress.keys.get(name, "")
        columns = rank_slice(self.study.lora, self.roster.lora_ranks.get(name), tally.number)
        part = slice_update(adapter, columns)
        try:
            dimension = sum(array.size for array in part.values())
            done = self.progress.round if self.continuous else None
            limits = self.limits.of(self.progress.sizes[name], dimension, start, done)
            limits["encoding"] = self.study.wire.update
            got = outcome(reply, part, self.study.private, before, key, wanted, **limits)
        except ConfigError as error:  # an honest site of such a size says so itself, when it joins
            got = Outcome("dropped", f"its declared size does not fit the plan: {error}")
        if got.status == "trained" and self.roster.stranger(reply.node, name):
            got = Outcome("refused", NOT_ENROLLED)
        if got.status == "trained":
            self.progress.receipts[name] = seal.receipt(self.parts.key, got.ledger)
            declared = self.progress.sizes[name] if self.asks.weights == "declared" else 1
            weight = min(declared, self._most(tally))
            if weight < declared:
                tally.weights[name] = weight
                got = replace_fields(got, reason=self._said_once(name, weight, declared))
            self.strategy.add(pad_update(got.update, adapter, columns), float(weight))
            self.progress.events[name] = got.events
            tally.count(self.study.digest, name)
        else:
            tally.failures[name] += got.status != "unprepared"
            tally.missing[name] = f"{got.status}: {got.reason}"
            if got.status == "refused":
                self.roster.refused[name] = got.reason
        self._tell(name, got.status, got.reason, tally.number)
        return got.status

    def _most(self, tally: Tally) -> int:
        """What a site counts for at most, whatever it declares; the same all round."""
        if not tally.largest:
            sizes = self.progress.sizes
            tally.largest = LARGEST * median_low(sizes[each] for each in self.roster.willing())
        return tally.largest

    def _said_once(self, name: str, weight: int, declared: int) -> str:
        said = any(name in entry.get("weights", {}) for entry in self.progress.history)
        return "" if said else summary.capped(weight, declared)

    def _keep(self, tally: Tally) -> None:
        """Apply the round, measure it, and make it last."""
        progress, number = self.progress, tally.number
        adapter = self.strategy.apply(progress.adapter)
        if not all(np.isfinite(array).all() for array in adapter.values()):
            raise InfrastructureError(f"round {number}: the aggregate is not finite")
        progress.adapter, progress.round = adapter, number
        progress.strategy = self.strategy.state()
        entry: dict[str, Any] = {
            "round": number,
            "rounds": self.rounds,
            "private": self.study.private,
            "participants": sorted(tally.participants),
            "missing": self.roster.out() | tally.missing,
            "late": dict(sorted(tally.late.items())),
            "quality": self._measure(number),
            "epsilon": summary.epsilons(progress, self.parts),
            "bytes_up": dict(sorted(self.roster.up.items())),
            "bytes_down": dict(sorted(self.roster.down.items())),
            "seconds": round(time.monotonic() - tally.started, 3),
        }
        ranks = self.roster.lora_ranks  # empty where the plan leaves sites no choice
        if ranks:
            entry["lora_ranks"] = {name: ranks[name] for name in sorted(tally.participants)}
        if tally.weights:
            entry["weights"] = dict(sorted(tally.weights.items()))
        if self.continuous:
            entry["slot"] = self.continuous.slot
        self.roster.up.clear()
        self.roster.down.clear()
        progress.history.append(entry)
        self._enter(Phase.KEPT)
        if self.queries.due():
            self._query()
        self._write_metrics()
        moved = sum(entry["bytes_up"].values()) + sum(entry["bytes_down"].values())
        self._event("round", **{**entry, "bytes": moved})

    def _query(self) -> None:
        """Ask the sites about the round just kept, and make the answer last. A crash in between
        asks again, and the sites send what they sent before."""
        found = self.queries.ask()
        self._enter(Phase.QUERIED)
        for name, why in found["missing"].items():
            status, _, reason = why.partition(": ")
            self._event("site", name=name, status=status, reason=f"private evaluation: {reason}")

    def _enter(self, phase: Phase) -> None:
        self.progress.enter(phase)
        self._save()

    def _save(self) -> None:
        progress = self.progress
        store.save(self.out, progress)
        self.receipts.keep({progress.keys[name]: r for name, r in progress.receipts.items()})

    def _measure(self, number: int) -> dict[str, float]:
        table = self.study.evaluation
        more = self.rounds is None or number < self.rounds
        if not table or (number % table.every and more) or (evaluator := self.evaluator) is None:
            return {}
        return evaluator.measure(self.progress.adapter)

    def _finish(self) -> dict[str, Any]:
        if not self.continuous:  # its adapters are released already
            progress, folder, draft = self.progress, self.out / "adapter", self.out / "adapter.new"
            shutil.rmtree(draft, ignore_errors=True)
            self.parts.save(self.study, progress.adapter, progress.frozen, draft)
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
        body = self._body()
        self.parts.report(self.out, body)
        if not self.continuous:  # it may go on
            self._enter(Phase.FINISHED)
        self._event("done", out=str(self.out), privacy=body["privacy"], quality=body["quality"])
        return body

    def _body(self) -> dict[str, Any]:
        body = summary.body(self.progress, self.parts)
        if self.continuous:
            body |= {"continuous": self.continuous.body()}
            body["quality"] = {**body["quality"], "after": self.continuous.after()}
        return body

    def _write_metrics(self) -> None:
        """metrics.jsonl, whole: after a crash it agrees with the checkpoint again."""
        lines = [json.dumps(entry, sort_keys=True) + "\n" for entry in self.progress.history]
        replace(self.out / "metrics.jsonl", "".join(lines).encode())

    def _tell(self, name: str, status: str, reason: str, round_: int | None = None) -> None:
        if round_ is None and status != "failed":
            said = "" if status == "admitted" else f": {reason}"
            self.progress.admission[name] = status + said
        number = round_ or self.progress.round + 1
        self._event("site", name=name, status=status, reason=reason, round=number)

    def _event(self, kind: str, **data: Any) -> None:
        self.on_event(kind, {"private": self.study.private, "rounds": self.rounds, **data})
