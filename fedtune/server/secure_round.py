"""Run the coordinator's part of a round with secure aggregation. The coordinator learns only the
sum of the sites' noised gradients.

    ready    every site draws its noised sum and sends a signed statement about this draw; then the
             set of sites is fixed
    masked   each site of the set sends its sum as masked words; the masks cancel only in the total
    open     when all words have arrived, the coordinator takes the optimiser's step on the mean
             gradient of all units

If a site of the set does not send its words, nothing is opened. The next attempt is a new draw, for
which every site pays again. The set of an attempt is saved before any site is informed of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord

from fedtune.core.config import Study, noise_shares
from fedtune.core.dp.shared_noise import bits_of, grid_of, own_sigma
from fedtune.core.errors import InfrastructureError
from fedtune.core.secagg.masks import dtype_of
from fedtune.core.secagg.statement import Draw, StatementError, parse, set_digest, set_text
from fedtune.core.strategy import Strategy
from fedtune.core.wire import codec, seal
from fedtune.core.wire.arrays import Arrays, check_agreed, unpack_arrays
from fedtune.core.wire.codec import VALUES, Form
from fedtune.server.admission import NOT_ENROLLED, Outcome, Roster, Tally, outcome
from fedtune.server.bound import Limits, Terms, norm_bound
from fedtune.server.masked_sum import MaskedSum
from fedtune.server.orders import Answer, Order, exchange
from fedtune.server.parts import Settings
from fedtune.server.store import Progress

REPEATS = 3  # times that the sites of a set are asked again before their attempt is void
ROUNDING = 1.01  # factor on the norm bound, since rows and noise are rounded to the sum's grid
ADAM_EPSILON = 1e-8  # the eps of torch.optim.AdamW, which its step adds to the divisor
OnStatus = Callable[[str, str, str, int], None]


@dataclass
class SecureRound:
    """Runs the rounds of a study with secure aggregation. Each call of `advance` asks the sites
    once, and takes the current round as far as their replies allow.

    A restart continues from progress.attempt: {"round", "number": the attempt's number in the
    round, "statements": site -> its statement, "closed": whether the set of sites is fixed}."""

    progress: Progress
    roster: Roster
    settings: Settings
    limits: Limits
    strategy: Strategy
    receipt: Callable[[str], dict[str, Any] | None]
    save: Callable[[], None]
    on_status: OnStatus
    weight_cap: Callable[[Tally], int]
    _sum: MaskedSum | None = None

    @property
    def study(self) -> Study:
        return self.progress.study

    def advance(self, names: list[str], tally: Tally) -> None:
        """Ask the sites `names` once for their statements. If there are enough, fix the set of
        sites, and ask these for their masked words. If all words arrive, open the sum, take the
        step, and count these sites in `tally`."""
        attempt, least = self._attempt(tally.number), self.study.strategy.min_sites
        if not attempt["closed"]:
            self._collect([n for n in names if n not in attempt["statements"]], tally)
            if len(attempt["statements"]) < least:
                return
            attempt["closed"] = True
            self.save()
        self._open(tally)

    def _attempt(self, number: int) -> dict[str, Any]:
        """Return the state of the current attempt at round `number`, as in progress.attempt. If
        there is none, begin the first attempt."""
        attempt = self.progress.attempt
        if attempt.get("round") != number:
            self._begin(number, 1)
        return self.progress.attempt

    def _begin(self, round_: int, number: int) -> None:
        self._sum = None
        self.progress.attempt = {"round": round_, "number": number, "statements": {}}
        self.progress.attempt["closed"] = False

    # ------------------------------------------------------------------------------------ ready

    def _collect(self, names: list[str], tally: Tally) -> None:
        """Ask the sites `names` to make their draws for the current attempt. Keep each signed
        statement in which a site says that it is ready, if the statement is about this attempt."""
        attempt, progress = self.progress.attempt, self.progress
        asked = [progress.keys[name] for name in {*names, *attempt["statements"]}]
        record = ConfigRecord({"asked": json.dumps(sorted(asked))})
        order = self._order("ready", tally.number, {"set": record}, adapter=True)
        draw = Draw(self.study.digest, tally.number, attempt["number"], self._adapter_digest())
        exchange(*self._parties(), names, order, partial(self._take_ready, tally, draw))

    def _take_ready(self, tally: Tally, draw: Draw, answer: Answer) -> str:
        read = partial(_unpack_agreed, {})
        result = self._check_reply(answer, read, record="ready", done="ready")
        statements = self.progress.attempt["statements"]
        if result.status == "ready":
            result = self._check_statement(answer.name, draw, result)
        if result.status == "ready":
            statements[answer.name] = result.evidence["said"]["ready"]
            self.progress.receipts[answer.name] = seal.receipt(self.settings.key, result.ledger)
            tally.missing.pop(answer.name, None)
        return self._note_reply(tally, answer, result)

    def _check_statement(self, name: str, draw: Draw, result: Outcome) -> Outcome:
        """Check the statement in which the site `name` says that it is ready: it must be about this
        draw, and state the size and key with which the site was admitted, and the plan's noise. If
        this is so, return `result`, the outcome of the reply with the statement; else return an
        outcome of the status "dropped", with the reason."""
        try:
            ready = parse(result.evidence["said"].get("ready"))
        except StatementError as error:
            return Outcome("dropped", error.happened)
        expected = (draw, name, self.progress.sizes[name], self.progress.keys[name])
        if (ready.draw, ready.site, ready.size, ready.signing) != expected:
            return Outcome("dropped", "its statement is about another draw, or another site")
        sigma = self._mechanism()[1]
        own = 0.0 if sigma is None else own_sigma(sigma, noise_shares(self.study))
        if ready.noise != own:  # the sum's grid follows from σ, so it must be equal at all sites
            return Outcome("dropped", "it adds another noise than the plan's: compare the releases")
        return result

    # ----------------------------------------------------------------------------------- masked

    def _open(self, tally: Tally) -> None:
        """Ask the sites of the attempt's set for their masked words. If all have arrived, open
        their sum; if a site refuses, or words are missing after REPEATS repetitions, begin a new
        attempt."""
        attempt = self.progress.attempt
        statements = [parse(text) for text in attempt["statements"].values()]
        words = self._sum = self._sum or MaskedSum(statements, self._dimension, self._bits())
        evidence: dict[str, Outcome] = {}
        record = ConfigRecord({"statements": set_text(statements)})
        nbytes = self._dimension * words.bits // 8
        order = self._order("masked", tally.number, {"set": record}, arrays=nbytes)
        for repeat in range(1 + REPEATS):
            if repeat:
                self.settings.turn.pause(self.settings.pause * repeat)
                self.roster.join()
            reachable = [name for name in words.missing if name in self.roster.list_willing()]
            take = partial(self._take_words, tally, words, evidence, set_digest(statements))
            exchange(*self._parties(), reachable, order, take)
            if not words.missing:
                return self._apply(tally, words, evidence)
            if self._is_void(tally, words.missing):
                break
        for name in words.missing:
            tally.failures[name] += 1
            tally.missing.setdefault(name, "failed: it did not send its masked words")
        self._begin(tally.number, attempt["number"] + 1)
        self.save()

    def _is_void(self, tally: Tally, names: list[str]) -> bool:
        """Return whether the attempt has failed for good: one of the sites `names` answered that it
        will never send words for it. A reply that was dropped is no such answer: it may be an old
        one, and the site's next reply may be valid."""
        told = [tally.missing.get(name, "") for name in names]
        return any(why.startswith(("void", "refused")) for why in told)

    def _take_words(
        self,
        tally: Tally,
        words: MaskedSum,
        evidence: dict[str, Outcome],
        chosen: str,
        answer: Answer,
    ) -> str:
        """Check a site's masked words, add them to the sum, and return the reply's status.

        - tally: the round's replies, in which a reason is noted if the words do not count
        - words: the running sum of this attempt
        - evidence: site -> its checked reply without the words, to which this reply is added
        - chosen: the digest of the attempt's set of sites (`set_digest`), which the reply must name
        - answer: the reply, with the context that its seal must state"""
        name = answer.name
        if name not in words.missing:
            self.on_status(name, "dropped", "its words are counted already", tally.number)
            return "dropped"
        form = Form(np.dtype(dtype_of(words.bits)).name, (self._dimension,))
        read = partial(_unpack_agreed, {VALUES: form})
        result = self._check_reply(answer, read, record="update", done="masked")
        if result.status == "masked" and result.evidence["said"].get("set") != chosen:
            result = Outcome("dropped", "its words are masked for another set of sites")
        if result.status == "masked":
            words.add(name, result.update[VALUES])
            evidence[name] = replace(result, update={})
            self.progress.receipts[name] = seal.receipt(self.settings.key, result.ledger)
            tally.missing.pop(name, None)
        return self._note_reply(tally, answer, result)

    # -------------------------------------------------------------------------------------- open

    def _apply(self, tally: Tally, words: MaskedSum, evidence: dict[str, Outcome]) -> None:
        """Open the sum of all words, take the optimiser's step on the mean gradient, and count the
        sites of the set in `tally`. evidence: site -> its checked reply, without its words.

        Errors: InfrastructureError if the sum is larger than honest sites can make it."""
        sites, total = self._weights(tally, list(words.statements)), words.open()
        if np.abs(total.astype(np.float64)).max(initial=0) >= 2 ** (words.bits - 2):
            self._refuse_sum(tally.number, "is outside the range of its words")
        rate, sigma = self._mechanism()
        divisor = rate * self.study.records_per_draw * sum(sites.values())
        flat = total.astype(np.float64) * (grid_of(self.study, sigma, self._dimension) / divisor)
        update = step_adapter(self.study, self._split(flat), self._like, tally.number)
        if codec.length(update) > self._bound_norm(len(sites), rate, sigma, divisor):
            self._refuse_sum(tally.number, "is longer than the plan's noise and clipping allow")
        self.strategy.add(update, 1.0)
        self._begin(tally.number, self.progress.attempt["number"])
        for name, result in sorted(evidence.items()):
            self.progress.events[name] = result.events
            tally.count(self.study.digest, name, result.evidence)
            self.on_status(name, "trained", "", tally.number)

    def _weights(self, tally: Tally, names: list[str]) -> dict[str, int]:
        """Return, for each of the sites `names`, the number of units that it adds to the mean's
        divisor. This is its declared size, but at most the round's weight cap, so that no site can
        shrink the common step to nothing by declaring a huge size."""
        sizes, most = self.progress.sizes, self.weight_cap(tally)
        tally.weights |= {name: most for name in names if sizes[name] > most}
        return {name: min(sizes[name], most) for name in names}

    def _bound_norm(self, sites: int, rate: float, sigma: float | None, divisor: float) -> float:
        """Return the largest norm that the step can have if all sites are honest; infinite without
        privacy. `bound.norm_bound`, which bounds one site's update, is called with the noise of all
        sites and the divisor of all their units.

        - sites: the number of sites in the sum
        - rate: the sampling rate q
        - sigma: None without privacy. Every number gives the same result, since the noise follows
          from the plan
        - divisor: q · records of a unit · units, by which the sum is divided"""
        clipping = self.study.clipping
        if sigma is None or clipping is None:
            return math.inf
        own = self.limits.of(max(self.progress.sizes.values()), self._dimension, 0.0, None)["terms"]
        joint = Terms(
            sampling_rate=rate,
            noise_multiplier=own.noise_multiplier * math.sqrt(sites),
            max_grad_norm=clipping.max_grad_norm,
            records=self.study.records_per_draw,
            divisor=divisor,
            steps=own.steps,
        )
        start = codec.length(self.progress.adapter)
        return ROUNDING * norm_bound(self.study, joint, self._dimension, start)

    def _refuse_sum(self, number: int, what: str) -> NoReturn:
        self._begin(number, self.progress.attempt["number"] + 1)  # so that --resume draws anew
        self.save()
        raise InfrastructureError(
            f"round {number}: the sum of the sites' updates {what}; one of the sites "
            "sent something else, and it cannot be known which one",
            "a sum of updates as the plan defines them",
            "ask each site for its release of fedtune and its log; nothing of this round was kept",
        )

    # ------------------------------------------------------------------------------------ helpers

    def _check_reply(
        self, answer: Answer, read: Callable[[ArrayRecord], Arrays], *, record: str, done: str
    ) -> Outcome:
        """Validate a reply's seal, arrays and step log, and count its bytes.

        - answer: the reply, with the context that its seal must state
        - read: checks and decodes the reply's arrays; raises WireError
        - record: the name of the reply's array record
        - done: the status of a site that did the work

        Returns the reply's outcome, which is "refused" also if the node is no longer enrolled for
        the site."""
        name = answer.name
        reply = answer.reply
        events = self.progress.events
        self.roster.down[name] += answer.sent
        self.roster.up[name] += reply.size
        before = events.get(name, [])
        key, size = self.progress.keys.get(name, ""), self.progress.sizes[name]
        terms = self.limits.of(size, self._dimension, 0.0, None).get("terms")
        expected = answer.expected
        kind: dict[str, Any] = {"record": record, "done": done, "terms": terms, "read": read}
        result = outcome(reply, {}, self.study.private, before, key, expected, **kind)
        if result.status == done and self.roster.is_stranger(reply.node, name):
            return Outcome("refused", NOT_ENROLLED)
        return result

    def _note_reply(self, tally: Tally, answer: Answer, result: Outcome) -> str:
        """Note in `tally` and the roster why a site's reply does not count, if that is so. Report
        the reply's status, and return it. answer: the reply as it arrived. result: the reply after
        it was validated."""
        name = answer.name
        if result.status not in ("ready", "masked"):
            tally.failures[name] += result.status != "unprepared"
            if tally.note_missing(name, result):
                return result.status
            if result.status == "refused":
                self.roster.refused[name] = result.reason
        self.on_status(name, result.status, result.reason, tally.number)
        return result.status

    def _order(
        self,
        kind: str,
        number: int,
        said: dict[str, ConfigRecord],
        *,
        adapter: bool = False,
        arrays: int = 0,
    ) -> Order:
        """Build the order of one part of the current attempt at a round.

        - kind: the part, "ready" or "masked"
        - number: the number of the round
        - said: further records that are sent with the order, by name
        - adapter: whether the newest adapter is sent with the order
        - arrays: the number of bytes that the arrays of an answer may have"""
        attempt = self.progress.attempt["number"]
        return Order(
            kind=f"train.{kind}",
            plan=f"{self.study.digest}:{kind}",
            round=number,
            group=f"{number} {kind} {attempt}",
            receipt=self.receipt,
            arrays=arrays,
            attempt=attempt,
            said=said,
            adapter=adapter,
        )

    def _parties(self) -> tuple[Progress, Roster, Any]:
        return self.progress, self.roster, self.settings.key

    @property
    def _dimension(self) -> int:
        return sum(array.size for array in self._like.values())

    @property
    def _like(self) -> Arrays:
        """Return arrays with the names and shapes of a site's update; their values do not
        matter. For strategies that average updates of the adapter, these are the newest
        adapter's arrays."""
        return self.strategy.update_like(self.progress.adapter)

    def _adapter_digest(self) -> str:
        """Compute the digest of the newest adapter after it is encoded for the wire and decoded, as
        sites see it."""
        adapter = self.progress.adapter
        sent = codec.encode(adapter, self.study.wire.adapter)
        return codec.digest(codec.decode(sent, codec.shapes(adapter)))

    def _mechanism(self) -> tuple[float, float | None]:
        """Return two numbers: the sampling rate q, and σ of the noise in the opened sum of all
        sites (None without privacy). Both are the same for every declared size."""
        rate = self.study.training.sampling_rate
        assert rate is not None  # Study requires it with [secure_aggregation]
        if not self.study.private:
            return rate, None
        return rate, self.limits.mechanism(max(self.progress.sizes.values())).noise_multiplier

    def _bits(self) -> int:
        sizes = [self.progress.sizes[name] for name in self.progress.attempt["statements"]]
        return bits_of(self.study, self._mechanism()[1], sizes, self._dimension)

    def _split(self, flat: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        """Cut the mean gradient `flat`, (d,), into the update's tensors, which stand in it in the
        order of their names. Return name -> tensor."""
        parts, at = {}, 0
        for name, shape in sorted(codec.shapes(self._like).items()):
            size = math.prod(shape)
            parts[name] = flat[at : at + size].reshape(shape)
            at += size
        return parts


def _unpack_agreed(forms: dict[str, Form], arrays: ArrayRecord) -> Arrays:
    check_agreed(arrays, forms)
    return unpack_arrays(arrays)


def step_adapter(
    study: Study,
    gradient: dict[str, npt.NDArray[np.float64]],
    adapter: Arrays,
    round_: int,
) -> Arrays:
    """Take one step of the plan's optimiser along the mean gradient g, and return the change of the
    adapter w, name -> array in fp32. Like a site's optimiser, it keeps no state between rounds.
    Here η is the learning rate and λ the weight decay:

    | optimiser | change of the adapter                                                     |
    | sgd       | -η (g + λw)                                                               |
    | adamw     | -η (g / (|g| + 10⁻⁸) + λw): AdamW's first step (Loshchilov & Hutter 2019) |

    - study: the plan, which gives optimiser, learning rate and weight decay
    - gradient: g, name -> array in fp64
    - adapter: w, with at least the names of `gradient`, in the same shapes
    - round_: the number of the round, on which the learning rate may depend"""
    t = study.training
    update = {}
    for name, g in gradient.items():
        direction = g if t.optimizer == "sgd" else g / (np.abs(g) + ADAM_EPSILON)
        decay = t.weight_decay * adapter[name].astype(np.float64)
        update[name] = (-t.rate(round_) * (direction + decay)).astype(np.float32)
    return update


def of(progress: Progress, *parties: Any) -> Callable[[list[str], Tally], None] | None:
    """Return the function that runs a study's rounds with secure aggregation, SecureRound.advance;
    None if the plan has no [secure_aggregation]. parties: the further arguments of SecureRound,
    after `progress`."""
    secure = progress.study.secure_aggregation
    return SecureRound(progress, *parties).advance if secure else None
