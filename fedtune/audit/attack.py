"""Attack models that are trained as a study trains them: likelihood-ratio membership inference on
canaries, and the exposure and extraction of planted secrets.

Reference: Carlini et al. 2022, "Membership inference attacks from first principles", section 5;
Carlini et al. 2019, "The secret sharer", section 4.2."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.accounting.update_noise import gain_of_noise
from fedtune.audit.membership import Membership, Scores, membership
from fedtune.audit.secret import (
    CONFIDENCE,
    SECRETS,
    Exposure,
    as_dataset,
    exposure,
    generate_secrets,
    most_exposed,
    most_extracted,
    record_losses,
)
from fedtune.core import progress
from fedtune.core.config import Study
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.dp import accountant
from fedtune.core.dp.non_private import non_private_plan
from fedtune.core.dp.plan import DpPlan, StepPlan, plan_for_site
from fedtune.core.dp.steplog import events
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.files.writing import replace as write_file
from fedtune.core.models import preconditioner
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.tiny import generate_records
from fedtune.core.strategy import Strategy, build_strategy
from fedtune.core.training.local_round import local_round
from fedtune.core.training.selftest import MemoryLog
from fedtune.public.start import Start, start
from fedtune.runs.run import Run

CANARIES, MODELS = 64, 16  # their product is the number of guesses, half of them about members
LEAST = 8  # models needed for three references with each canary and three without
SUCCEEDS = 0.8  # area under the curve that the attack must reach without noise to count as valid


@dataclass(frozen=True)
class Secrets:
    """How much models reveal of secrets. A secret is an 8-digit number in the record of one unit.

    - private, twin: the secrets' exposure (how far up the model ranks them among random numbers, in
      bits) in a model as the study trains it, and in a model without noise
    - allowed: the largest mean exposure in bits that (ε, δ) allows, at 99.9 % confidence
    - extractable: the largest probability, under (ε, δ), that the model writes a given secret"""

    private: Exposure
    twin: Exposure
    allowed: float
    extractable: float

    @property
    def contradicts(self) -> bool:
        """Return whether the exposure or extraction exceeds what ε allows, at 99.9 % confidence."""
        chance = self.private.secrets * self.extractable
        return self.private.mean > self.allowed or bool(
            self.private.extracted and chance < 1 - CONFIDENCE
        )


@dataclass(frozen=True)
class Attack:
    """The result of an attack that guesses which canaries (test units) each of several models was
    trained on.

    - private: how well the attack tells the canaries that a model was trained on (the members) from
      the others, for models that were trained by the plan
    - twin: how well it tells them apart for models that were trained without noise
    - units: the number of units of the attacked site
    - epsilon, delta: the ε and δ of training one model at this site
    - secrets: how much a model reveals of planted secrets; None for a study whose model writes no
      text, or reads more than text
    - plan_digest: the digest of the plan by which the models with noise were trained
    - left_out: names of the study's tables that were not used for these models"""

    study: str
    plan_digest: str
    canaries: int
    models: int
    units: int
    rounds: int
    epsilon: float
    delta: float
    private: Membership
    twin: Membership
    secrets: Secrets | None = None
    left_out: tuple[str, ...] = ()

    @property
    def succeeds(self) -> bool:
        """Return whether the attack succeeds against models without noise, as a valid attack
        must."""
        return self.twin.auc[0] >= SUCCEEDS


def attack_study(
    study: Study,
    out: Path | str | None = None,
    *,
    canaries: int = CANARIES,
    models: int = MODELS,
    units: int = 100,
) -> Attack:
    """Train models as the study's sites would, each with half of the canaries, and guess for each
    model which canaries it was trained on. For a study on text, also measure how much a model
    reveals of secrets that were planted among its units.

    One site of `units` generated units trains alone, so that no other site's noise protects it. The
    attacker sees only the final adapter, and has the other models as references. The attack is
    repeated on models without noise. Training starts as in the study, including [public] text, and
    the coordinator's steps are those of the study's [strategy]; [selection] is left out. This reads
    no private record and costs no ε.

    Args:
        study: the private study whose base, objective, plan and start are used.
        out: a folder for attack.json and attack.png; None writes nothing.
        canaries: the number of units that hold one record of random tokens; each is in half of the
            models.
        models: the number of models with noise, at least 8; as many are trained without noise. For
            each model, the others are the attacker's references.
        units: the number of units of the site, at least as many as canaries; ε is computed for a
            site of this size.

    >>> import fedtune
    >>> fedtune.attack_study(fedtune.load_study("no/study.toml"))
    Traceback (most recent call last):
      ...
    fedtune.core.errors.ConfigError: ...

    Errors: ConfigError (no privacy to attack; too few models or units; the study's public text is
    not here), ModelError, InfrastructureError."""
    _check(study, canaries, models, units)
    plan_digest = study.digest
    network = build(study)
    with network.loaded(network.frozen_factor() | network.preconditioner):  # the block restores it
        begun = begin_again(study)
        study = begun.study
        plan = plan_for_site(study, units)
        everybody, secrets = _units(study, network, canaries, units - canaries // 2)
        coins = _coins(canaries, models)
        world = _World(begun, network, everybody, coins, secrets, plan.rounds, units)
        log = MemoryLog()
        private, exposed = world.train_models(plan, log)
        epsilon = accountant.epsilon(events(log.lines[: plan.steps]), plan.delta)
        bare, bare_exposed = world.train_models(non_private_plan(study, units), MemoryLog())
    result = Attack(
        study=study.study.name,
        plan_digest=plan_digest,
        canaries=canaries,
        models=models,
        units=units,
        rounds=plan.rounds,
        epsilon=epsilon,
        delta=plan.delta,
        private=_judge_losses(private, coins, epsilon, plan.delta),
        twin=_judge_losses(bare, coins, None, plan.delta),
        secrets=_given_away(exposed, bare_exposed, epsilon, plan.delta),
        left_out=("selection",) if study.selection else (),
    )
    if out is not None:
        save(result, Path(out))
    return result


def attack_run(run: Run, out: Path | str | None = None, **options: Any) -> Attack:
    """Attack models that are trained as a finished run's study trains them, from the same starting
    point.

    out: a folder for attack.json and attack.png; None writes nothing. options: other arguments of
    `attack_study`: canaries, models, units.

    >>> import fedtune
    >>> fedtune.attack_run(fedtune.Run("runs/none"))
    Traceback (most recent call last):
      ...
    fedtune.core.errors.InputError: ...

    Errors: InputError if the run is not finished; those of `attack_study`, such as ConfigError if
    the run was trained without privacy."""
    if not run.private:
        raise ConfigError(f"{run.folder}: not private, so there is no ε to attack")
    return attack_study(run.study, out, **options)


def _check(study: Study, canaries: int, models: int, units: int) -> None:
    """Check the settings of an attack, before a model is trained.

    - study: the study that is attacked; it must have privacy
    - canaries: the number of units that hold one record of random tokens, from 1 to `units`
    - models: the number of models with noise, at least LEAST
    - units: the number of units of the attacked site

    Errors: ConfigError."""
    if not study.private:
        raise ConfigError('privacy = "off": there is no ε to attack', "a [privacy] table")
    if models < LEAST:
        raise ConfigError(f"{models} models of each kind", f"at least {LEAST}")
    if not 1 <= canaries <= units:
        raise ConfigError(
            f"{canaries} canaries among {units} units",
            "at least one, and no more than --units: each model sees half of the canaries",
        )


def begin_again(study: Study) -> Start:
    """Compute again the starting point of a finished run's study: its adapter before the first
    round, and all else that is computed from public text. The results are not compared with their
    digests in the plan, since another machine computes the same start only up to rounding. So the
    digests are removed from the plan. Only the digest of a basis of class statistics stays, since
    `start` never compares it.

    Errors: ConfigError if this machine does not have the public text, ModelError."""
    open_again: dict[str, Any] = {}
    if study.lora:
        table = study.lora.preconditioner
        again = table and table.model_copy(update={"digest": None})
        factor = {"a_digest": None, "preconditioner": again}
        open_again["lora"] = study.lora.model_copy(update=factor)
    if study.start:
        open_again["start"] = study.start.model_copy(update={"digest": None})
    try:
        return start(study.model_copy(update=open_again))
    except DataError as error:
        raise ConfigError(
            f"the study starts from public text, which cannot be read here: {error}",
            "the files of [public], as at the coordinator",
            "run the attack on the machine that has them",
        ) from None


def begin_strategy(begun: Start) -> Strategy:
    """Build the study's strategy as a coordinator does, in its state before the first round. begun:
    the study's starting point. Errors: ConfigError."""
    strategy = build_strategy(begun.study)
    strategy.load_state(begun.strategy)
    strategy.prepare(begun.study, begun.frozen)
    return strategy


def noise_of_step(plan: StepPlan) -> float:
    """Return the standard deviation of the noise in each number of a step's mean gradient; 0 for a
    plan without noise."""
    if not isinstance(plan, DpPlan):
        return 0.0
    return plan.own_noise * plan.max_grad_norm / plan.divisor


def save(result: Attack, out: Path) -> None:
    """Write attack.json and attack.png into the folder `out`. Errors: InfrastructureError."""
    from fedtune.audit.picture import curves

    facts: dict[str, Any] = asdict(result) | {"succeeds": result.succeeds}
    text = json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False)
    write_file(out / "attack.json", (text + "\n").encode())
    named = {"without noise": result.twin, f"ε = {result.epsilon:.3g}": result.private}
    write_file(out / "attack.png", curves(named, result.epsilon, result.delta))


def _coins(canaries: int, models: int) -> np.ndarray:
    """Draw at random which canary is in which model; each canary is in half of the models. Return a
    bool array (models, canaries)."""
    draw = np.random.default_rng()
    half = np.arange(models) < models // 2
    return np.stack([draw.permutation(half) for _ in range(canaries)], axis=1)


def _units(study: Study, network: Network, canaries: int, others: int) -> tuple[Dataset, int]:
    """Generate an attack's units. A unit holds one record, repeated as often as the plan has
    records per draw. The canaries come first, then the units that are in every model; the last of
    these units hold one secret each.

    - study: the study for whose objective and record format the records are made; its seed
      determines them
    - network: the study's network, whose tokenizer and file reader the records must fit
    - canaries: the number of units of which each is in half of the models
    - others: the number of units that are in every model

    Returns two things: the units, `canaries` + `others` in number; and how many of the units hold a
    secret, at most SECRETS, and 0 if the study's records cannot hold one."""
    secrets = _generate_secrets(study, network, min(SECRETS, others))
    random = generate_records(
        study, network, [1] * (canaries + others - len(secrets)), stream=3
    ).examples
    units = [replace(e, unit=unit) for unit, e in enumerate([*random, *secrets])]
    examples = [e for e in units for _ in range(study.records_per_draw)]
    return Dataset(examples, canaries + others, Counter()), len(secrets)


def _generate_secrets(study: Study, network: Network, secrets: int) -> list[Example]:
    """Generate `secrets` units with a secret each, for the study's record format and the network's
    tokenizer; [] if the study's model writes no text, or its records are too short for a secret."""
    objective = study.objective.resolved
    writes = objective.record_format in ("text", "preference") and not objective.teacher_spec
    if not writes or network.reader.column:
        return []
    try:
        return list(as_dataset(generate_secrets(study, secrets), network, study).examples)
    except DataError:
        return []


def _given_away(
    private: Exposure | None, twin: Exposure | None, epsilon: float, delta: float
) -> Secrets | None:
    """Compare how much the models reveal of secrets with what (ε, δ) allows; return None if the
    models' exposure was not measured.

    - private, twin: the secrets' exposure in a model with noise, and in one without; None if the
      study's records hold no secret
    - epsilon, delta: the ε and δ of training one model, which bound the exposure"""
    if private is None or twin is None:
        return None
    allowed = most_exposed(private, epsilon, delta)
    return Secrets(private, twin, allowed, most_extracted(epsilon, delta))


@dataclass(frozen=True)
class _World:
    """What all models of an attack have in common.

    - begun: the starting point of each model, with the study that is trained
    - network: the study's network, into which each model's arrays are loaded in turn
    - everybody: the units that may be in a model, the canaries first
    - coins: which canaries are in which model, bool (models, canaries)
    - secrets: the number of units with a secret
    - rounds: the number of rounds for which each model is trained
    - units: the declared size of the site that trains"""

    begun: Start
    network: Network
    everybody: Dataset
    coins: np.ndarray
    secrets: int
    rounds: int
    units: int

    def train_models(self, plan: StepPlan, log: MemoryLog) -> tuple[Scores, Exposure | None]:
        """Train one model for each row of `coins`: on the canaries that the row marks, and on all
        other units.

        - plan: how a round's steps run, with noise or without
        - log: gets a line for each noised step of each model

        Returns: each canary's mean loss in each model, (models, canaries), and the secrets'
        exposure in the first model, None if there are no secrets."""
        network = self.network
        study = self.begun.study
        canaries = self.coins.shape[1]
        units = self.everybody.n_units
        losses = []
        exposed = None
        asked = CachedDataset(network, _select_units(self.everybody, np.arange(units) < canaries))
        for number, row in enumerate(self.coins, 1):
            there = np.concatenate([row, np.ones(units - canaries, dtype=bool)])
            data = CachedDataset(network, _select_units(self.everybody, there))
            adapter, server = self.begun.adapter, begin_strategy(self.begun)
            with network.loaded(trainable=adapter):
                for round_ in range(1, self.rounds + 1):
                    server.add(local_round(study, data, plan, log, round_, adapter), 1.0)
                    noise = noise_of_step(plan) * gain_of_noise(study, round_)
                    server.describe_round(self.units, noise)
                    adapter = preconditioner.step_adapter(server.apply, adapter, self.begun.frozen)
                network.load_trainable(adapter)
                by_unit = record_losses(asked, study).reshape(canaries, -1).mean(axis=1)
                losses.append(by_unit)
                if self.secrets and exposed is None:
                    exposed = exposure(network, study, self.secrets)
            what = "models with noise" if isinstance(plan, DpPlan) else "models without noise"
            progress.report(what, number, len(self.coins))
        return np.array(losses), exposed


def _select_units(everybody: Dataset, there: np.ndarray) -> Dataset:
    index = np.cumsum(there) - 1
    examples = [replace(e, unit=int(index[e.unit])) for e in everybody.examples if there[e.unit]]
    return Dataset(examples, int(there.sum()), Counter())


def _judge_losses(
    losses: Scores, coins: np.ndarray, epsilon: float | None, delta: float
) -> Membership:
    """Score each canary in each model by comparison with the other models' losses, and measure how
    well the scores tell members from others.

    - losses: each canary's mean loss in each model, (models, canaries)
    - coins: whether each model was trained on each canary, bool (models, canaries)
    - epsilon: the ε of training one model; None for models without noise, to which no bound applies
    - delta: the δ of that ε"""
    scores = ratios(losses, coins)
    inside = np.array([scores[coins[:, c], c] for c in range(coins.shape[1])])
    outside = np.array([scores[~coins[:, c], c] for c in range(coins.shape[1])])
    return membership(inside, outside, epsilon, delta)


def ratios(losses: Scores, coins: np.ndarray) -> Scores:
    """Score, for each model and canary, how much the model's loss on the canary looks as if the
    canary was in its training: the log likelihood ratio of "in" to "out", as an array (models,
    canaries). The likelihoods are Gaussians of a common variance. Their means are the mean losses
    of the other models that had the canary, and of those that did not.

    Both means are taken over the same number of models, drawn at random. Otherwise the scores would
    tell members from others even without any leak. A model is not its own reference, so if it had
    the canary, one model less is left among those that had it (or else among those that did not).
    A mean over fewer models is on average further from any loss.

    - losses: each canary's mean loss in each model, (models, canaries)
    - coins: whether each model was trained on each canary, bool of the same shape"""
    draw, scores = np.random.default_rng(), np.empty_like(losses)
    for t in range(len(losses)):
        there, absent = coins.copy(), ~coins
        there[t] = absent[t] = False
        kept = np.minimum(there.sum(axis=0), absent.sum(axis=0))
        inside, outside = (
            np.where(_draw_models(kind, kept, draw), losses, np.nan) for kind in (there, absent)
        )
        mean_in, mean_out = np.nanmean(inside, axis=0), np.nanmean(outside, axis=0)
        spread = np.nanmean([np.nanvar(inside, axis=0), np.nanvar(outside, axis=0)]) + 1e-12
        scores[t] = ((losses[t] - mean_out) ** 2 - (losses[t] - mean_in) ** 2) / (2 * spread)
    return scores


def _draw_models(mask: np.ndarray, kept: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Draw at random, for each canary c, kept[c] of the models that column c of `mask` (models,
    canaries) marks. Return a mask of the same shape that marks the drawn models only."""
    order = np.where(mask, draw.random(mask.shape), np.inf)
    return mask & (order.argsort(axis=0).argsort(axis=0) < kept)
