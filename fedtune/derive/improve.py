"""A finished run learns to please a federated reward model: `fedtune improve`, at the coordinator.

Guarantee: reads two finished runs and public prompts alone. What comes out has at most the (ε, δ)
of both runs together, and its KL from the start is at most max_kl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.config import PublicTable, Study
from fedtune.data.files import Rejected
from fedtune.data.records import Record
from fedtune.data.tokenize import prompt_ids
from fedtune.derive import derived_run
from fedtune.derive.lineage import carried_over, parent
from fedtune.derive.preferences import Scored
from fedtune.derive.prompts import Prompts, read
from fedtune.derive.rloo import improve_by
from fedtune.derive.settings import RlooSettings
from fedtune.errors import ConfigError, DataError, Refused
from fedtune.models.build import dtype_of
from fedtune.models.loaded import LoadedModel, load
from fedtune.models.run import Run
from fedtune.objectives import resolve
from fedtune.progress import OnEvent, report, told
from fedtune.run_folder import new_folder

HELD_OUT = 0.25  # of the prompts: never trained on, measured before and after
LOOKED_AT = 48  # prompts of either kind that are measured on
SAMPLES = 4  # answers to each
CHOOSING, REPORTED = b"which policy to keep", b"what the report says"  # draws of answers
UNSCORED = -3.0  # the reward of an answer that is empty, or too long for the reward model


@dataclass(frozen=True)
class Look:
    """Means over the answers that were sampled: reward, in standard deviations of the start's
    rewards from their mean; kl: nats an answer, from the start; unscored: the share of answers that
    are empty or too long, since a reward may rise by these alone."""

    reward: float
    kl: float
    unscored: float

    def worth(self, kl_coef: float) -> float:
        """What the training strives for: the reward less the price of the KL."""
        return self.reward - kl_coef * self.kl


@dataclass
class PolicyScores:
    """by_step: what was seen after how many steps; best: of those with KL ≤ max_kl, with
    its arrays."""

    max_kl: float
    kl_coef: float
    eval_every: int
    steps: int
    by_step: list[tuple[int, Look]] = field(default_factory=list)
    best: tuple[int, Look, dict[str, torch.Tensor]] | None = None
    stopped: str = "all steps were taken"


def improve(
    run: Run,
    reward_run: Run,
    prompts: PublicTable,
    out: Path | str,
    *,
    max_kl: float = 4.0,
    eval_every: int = 10,
    how: RlooSettings | None = None,
    on_event: OnEvent | None = None,
) -> Run:
    """Train a run's model on public prompts towards what a reward run scores higher (RLOO).

    Args:
        out: the new run's folder; it is whole or not there.
        max_kl: nats of KL an answer, from the policy of `run`. Past it the training ends, and what
            is kept is the checkpoint with KL ≤ max_kl whose reward less how.kl_coef · KL is
            highest.
        eval_every: steps between two evaluations.
        on_event: called with ("step", {…}) as the work goes on.

    The report's figures come from answers drawn anew, because the best of several evaluations is
    biased upwards.

    Errors: Refused (no better checkpoint with KL ≤ max_kl), ConfigError, DataError, ModelError,
    InfrastructureError."""
    out, how = Path(out), how or RlooSettings()
    if not max_kl > 0:
        raise ConfigError(f"--max-kl {max_kl}", "nats above 0")
    quick = dtype_of("auto")  # of the bases; adapters and head stay in fp32
    policy, start = (load(run.folder, dtype=quick, trainable=learns) for learns in (True, False))
    judge = load(reward_run.folder, dtype=quick)
    study = _check(policy, judge, run, reward_run)
    public = read(prompts)
    held_in, held_out = _shared_out(public, policy, study, how)
    with told(on_event), new_folder(out) as draft:
        _choose_trained(policy)
        bench = Bench(policy, start, Scored(judge), study, how)
        seen = PolicyScores(
            max_kl, how.kl_coef, eval_every, how.steps, [(0, bench.centre(held_in))]
        )
        before = [bench.look(records, REPORTED) for records in (held_in, held_out)]
        texts = [(r.prompt, _as_read(r, study)) for r in held_in]
        improve_by(policy, texts, bench.rewards, _watching(seen, bench, held_in), how)
        if seen.best is None:
            raise _nothing_better(max_kl, how)
        _restore(policy, seen.best[2])
        after = [bench.look(records, REPORTED) for records in (held_in, held_out)]
        policy.model.save_pretrained(str(draft / "adapter"), selected_adapters=["default"])
        (draft / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty template
        made = derived_run.derived_study(study, out, "improved")
        parents = [parent(run, policy, "policy"), parent(reward_run, judge, "reward")]
        body = _body(made, policy, seen, before, after, public, how)
        came = carried_over(parents)
        body["derived"]["parents"] = came.pop("parents")
        derived_run.write(draft, made, body | came)
    return Run(out)


def _nothing_better(max_kl: float, how: RlooSettings) -> Refused:
    return Refused(
        f"no checkpoint with KL ≤ {max_kl:g} nats had a higher KL-penalised reward than the run",
        f"reward - {how.kl_coef:g} · KL above that of the starting policy",
        "more steps, a smaller learning rate, a larger --max-kl, or a smaller --kl-coef",
    )


def _check(policy: LoadedModel, judge: LoadedModel, run: Run, reward_run: Run) -> Study:
    if not policy.adapted or resolve(run.study.objective).outputs:
        raise ConfigError(f"{run.folder}: no run that writes", "a finished run with an adapter")
    if judge.study is None or judge.study.objective.name != "reward":
        raise ConfigError(
            f"{reward_run.folder}: no reward model", "a finished run of objective reward"
        )
    return run.study


def _shared_out(
    prompts: Prompts, policy: LoadedModel, study: Study, how: RlooSettings
) -> tuple[list[Record], list[Record]]:
    """Prompts to learn on and others, by the seed; too long ones are left out and counted."""
    room = min(study.objective.max_length, policy.room) - how.new_tokens
    fit = [
        record
        for record in prompts.records
        if len(prompt_ids(record.prompt, study.objective, policy.tokenizer)) <= room
    ]
    prompts.about["too_long"] = len(prompts.records) - len(fit)
    if len(fit) < 4:
        raise DataError(f"{len(fit)} prompts leave room for an answer", "at least 4")
    order = np.random.default_rng(how.seed).permutation(len(fit)).tolist()
    apart = max(1, round(HELD_OUT * len(fit)))
    return [fit[i] for i in order[apart:]], [fit[i] for i in order[:apart]]


def _as_read(record: Record, study: Study) -> str:
    return (study.objective.template or "{text}").replace("{text}", record.prompt)


def _choose_trained(policy: LoadedModel) -> None:
    """Both factors, also where the study froze A: there it keeps the sites' noise small; here there
    is none, and as few answers say hardly anything about B alone (decisions/0018)."""
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _watching(seen: PolicyScores, bench: Bench, records: list[Record]) -> Callable[[int], bool]:
    def look(step: int) -> bool:
        report("improving", step, seen.steps)
        if step % seen.eval_every and step != seen.steps:
            return True
        found = bench.look(records, CHOOSING)
        seen.by_step.append((step, found))
        if found.kl > seen.max_kl:
            seen.stopped = f"KL exceeded {seen.max_kl:g} nats after {step} steps"
            return False
        best = seen.best[1] if seen.best else seen.by_step[0][1]
        if found.worth(seen.kl_coef) > best.worth(seen.kl_coef):
            seen.best = step, found, _arrays(bench.policy)
        return True

    return look


def _arrays(policy: LoadedModel) -> dict[str, torch.Tensor]:
    arrays = policy.model.named_parameters()
    return {n: p.detach().clone() for n, p in arrays if "lora_" in n and ".default." in n}


@torch.no_grad()
def _restore(policy: LoadedModel, arrays: dict[str, torch.Tensor]) -> None:
    own = dict(policy.model.named_parameters())
    for name, value in arrays.items():
        own[name].copy_(value)


# -------------------------------------------------------------------------------- measuring


@dataclass
class Bench:
    """Measures a policy against where it started, by the reward model."""

    policy: LoadedModel
    start: LoadedModel
    judge: Scored
    study: Study
    how: RlooSettings
    mean: float = 0.0
    spread: float = 1.0

    def centre(self, records: Sequence[Record]) -> Look:
        """Rewards are counted from the mean of the start's answers to public prompts, in their
        standard deviations. Never from a private record. Returns where the start stands."""
        found = self._answers(records, CHOOSING)
        scores = [score for score, _ in found if score is not None]
        if not scores or not np.isfinite(scores).all():
            raise DataError("the reward model gives no finite score to the run's answers")
        self.mean, self.spread = float(np.mean(scores)), float(np.std(scores)) or 1.0
        return self._mean(found)

    def look(self, records: Sequence[Record], draws: bytes) -> Look:
        """Evaluate the policy with the same draws each time, so that two evaluations differ by
        their policies alone."""
        return self._mean(self._answers(records, draws))

    def rewards(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [*map(self._reward, self._scores(prompts, answers))]

    def _mean(self, found: Sequence[tuple[float | None, float]]) -> Look:
        scores, divergences = zip(*found, strict=True)
        rewards = [*map(self._reward, scores)]
        without = scores.count(None) / len(scores)
        return Look(float(np.mean(rewards)), float(np.mean(divergences)), without)

    def _reward(self, score: float | None) -> float:
        return UNSCORED if score is None else (score - self.mean) / self.spread

    def _scores(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """None where an answer is empty, or too long for the reward model."""
        passages: dict[int, np.ndarray] = {}
        for at, pair in enumerate(zip(prompts, answers, strict=True)):
            with suppress(Rejected):
                passages[at] = self.judge.passage(*pair)
        given = self.judge.model.scores_all([*passages.values()])[:, 0] if passages else ()
        by_place = dict(zip(passages, map(float, given), strict=True))
        return [by_place.get(at) for at in range(len(answers))]

    def _answers(self, records: Sequence[Record], draws: bytes) -> list[tuple[float | None, float]]:
        """(score, KL) of sampled answers; the KL at each token is exact, over the vocabulary."""
        records = records[:LOOKED_AT]
        read, how, words = self.study.objective, self.how, self.policy.tokenizer
        asked = [prompt_ids(record.prompt, read, words) for record in records]
        stream = b"%d\n%d\n%s" % (how.seed, len(records), draws)
        written = self.policy.write_all(asked, SAMPLES, how.new_tokens, stream, how.temperature)
        found: list[tuple[float | None, float]] = []
        for record, ids, answers in zip(records, asked, written, strict=True):
            texts = [str(words.decode(answer, skip_special_tokens=True)) for answer in answers]
            whole = [np.array([*ids, *answer], np.int32) for answer in answers]
            at = [np.arange(len(ids) - 1, len(one)) for one in whole]  # and what ends the answer
            said = (m.next_tokens_all(whole, at) for m in (self.policy, self.start))
            kl = [
                float((ours.exp() * (ours - start)).sum())
                for ours, start in zip(*said, strict=True)
            ]
            found += zip(self._scores([record.prompt] * len(texts), texts), kl, strict=True)
        return found


# ---------------------------------------------------------------------------------- report


def _settings(how: RlooSettings, max_kl: float) -> dict[str, Any]:
    """As the report has them, under the names of its format."""
    named = {{"kl_coef": "beta"}.get(name, name): value for name, value in vars(how).items()}
    return {**named, "leash": max_kl, "algorithm": "RLOO (trl)"}


def _body(
    study: Study,
    policy: LoadedModel,
    seen: PolicyScores,
    before: Sequence[Look],
    after: Sequence[Look],
    prompts: Prompts,
    how: RlooSettings,
) -> dict[str, Any]:
    assert seen.best is not None
    base = policy.base
    return {
        "base": {
            "name": study.base.model,
            "digest": base.digest,
            "licence": base.licence,
            "dtype": str(policy.model.dtype).removeprefix("torch."),
        },
        "adapter": derived_run.adapter_facts(study.lora),
        "quality": {
            "metric": "reward",
            "on": "public prompts that it learned on, answers drawn anew; reward in standard "
            "deviations from the run's mean, KL in nats an answer; by round: the evaluations by "
            "which the policy was chosen",
            "columns": ["the run", "improved"],
            "before": vars(before[0]),
            "after": vars(after[0]),
            "by_round": [{"round": at, **vars(look)} for at, look in seen.by_step],
        },
        "derived": {
            "step": "improved",
            "prompts": prompts.about,
            "settings": _settings(how, seen.max_kl),
            "measured": {
                "steps kept": seen.best[0],
                "ended": seen.stopped,
                "answers without a score, before": before[0].unscored,
                "answers without a score, after": after[0].unscored,
                "reward on prompts held out, before": before[1].reward,
                "reward on prompts held out, after": after[1].reward,
                "KL on prompts held out": after[1].kl,
            },
        },
    }
