"""Train a finished run against a federated reward model by RLOO: `fedtune improve`.

Guarantee: only two finished runs and public prompts are read, at the coordinator. The result's (ε,
δ) is at most that of both runs together, and its measured KL divergence from the starting policy is
at most max_kl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.core.config import PublicTable, Study
from fedtune.core.data.files import Rejected
from fedtune.core.data.records import Record
from fedtune.core.data.tokenize import prompt_ids
from fedtune.core.errors import ConfigError, DataError, Refused
from fedtune.core.models.build import dtype_of
from fedtune.core.models.loaded import LoadedModel, load
from fedtune.core.progress import OnEvent, report, told
from fedtune.derive import derived_run
from fedtune.derive.lineage import combined_lineage, parent
from fedtune.derive.preferences import RewardJudge
from fedtune.derive.prompts import Prompts, read
from fedtune.derive.rloo import train_rloo
from fedtune.derive.settings import RlooSettings
from fedtune.derive.writing import write_all
from fedtune.report.run_files import new_folder
from fedtune.runs.run import Run

HELD_OUT = 0.25  # share of the prompts that are not trained on, and measured before and after
MAX_EVALUATED = 48  # the most prompts to measure on, of training and of held-out ones each
SAMPLES = 4  # sampled answers to each prompt
# Seeds of the sampled answers: those by which a policy is chosen, and those of the report.
CHOOSING, REPORTED = b"which policy to keep", b"what the report says"
UNSCORED = -3.0  # the reward of an answer that is empty, or too long for the reward model


@dataclass(frozen=True)
class PolicyEvaluation:
    """The means of three measurements over sampled answers of a policy.

    - reward: how far the reward is above the mean reward of the starting policy, in standard
      deviations of that policy's rewards
    - kl: the KL divergence from the starting policy, in nats per answer
    - unscored: the share of answers that are empty or too long for the reward model"""

    reward: float
    kl: float
    unscored: float

    def penalised_reward(self, kl_coef: float) -> float:
        """Return the objective of the training: reward - kl_coef · KL."""
        return self.reward - kl_coef * self.kl


@dataclass
class PolicyScores:
    """The evaluations during a training, and the checkpoint that is kept.

    - max_kl: the largest KL divergence from the starting policy that a kept checkpoint may have
    - kl_coef: the penalty, in units of reward, for each nat of KL
    - eval_every: steps between two evaluations
    - steps: the number of steps of the whole training
    - by_step: (number of steps, evaluation) pairs, beginning with the start's at 0 steps
    - best: (number of steps, evaluation, adapter's arrays) of the checkpoint that is kept. Among
      the checkpoints with KL ≤ max_kl it has the highest penalised reward. None if no penalised
      reward is higher than that of the start
    - stopped: why the training ended"""

    max_kl: float
    kl_coef: float
    eval_every: int
    steps: int
    by_step: list[tuple[int, PolicyEvaluation]] = field(default_factory=list)
    best: tuple[int, PolicyEvaluation, dict[str, torch.Tensor]] | None = None
    stopped: str = "all steps were taken"


def improve(
    run: Run,
    reward_run: Run,
    prompts: PublicTable,
    out: Path | str,
    *,
    max_kl: float = 4.0,
    eval_every: int = 10,
    settings: RlooSettings | None = None,
    on_event: OnEvent | None = None,
) -> Run:
    """Train a run's model on public prompts towards answers that a reward run scores higher (RLOO).

    Args:
        run: the run whose adapter is trained further; it must write text.
        reward_run: a run of objective reward, whose head scores the answers.
        prompts: public prompts. A quarter of them is not trained on, only measured on.
        out: the new run's folder. It is not made if an error occurs.
        max_kl: the largest KL divergence from the policy of `run`, in nats per answer. Training
            ends when it is exceeded. Of the checkpoints with KL ≤ max_kl, the one with the highest
            reward - settings.kl_coef · KL is kept.
        eval_every: steps between two evaluations.
        settings: the settings of the training; None: the defaults of RlooSettings.
        on_event: called with ("step", {…}) to report progress.

    The report's figures come from newly sampled answers, since the best of several evaluations is
    biased upwards. Returns the new run.

    Errors: Refused (no better checkpoint with KL ≤ max_kl), ConfigError, DataError, ModelError,
    InfrastructureError."""
    out, settings = Path(out), settings or RlooSettings()
    if not max_kl > 0:
        raise ConfigError(f"--max-kl {max_kl}", "a number of nats above 0")
    dtype = dtype_of("auto")  # of the bases alone; adapters and head stay in fp32
    policy, start = (load(run.folder, dtype=dtype) for _ in range(2))
    judge = load(reward_run.folder, dtype=dtype)
    study = _check(policy, judge, run, reward_run)
    public = read(prompts)
    held_in, held_out = _split_prompts(public, policy, study, settings)
    with told(on_event), new_folder(out) as draft:
        _train_both_factors(policy)
        evaluator = PolicyEvaluator(policy, start, RewardJudge(judge), study, settings)
        scores = PolicyScores(
            max_kl, settings.kl_coef, eval_every, settings.steps, [(0, evaluator.centre(held_in))]
        )
        before = [evaluator.evaluate(records, REPORTED) for records in (held_in, held_out)]
        texts = [(r.prompt, _templated_prompt(r, study)) for r in held_in]
        train_rloo(
            policy, texts, evaluator.rewards, _step_callback(scores, evaluator, held_in), settings
        )
        if scores.best is None:
            raise _no_better_checkpoint(max_kl, settings)
        _restore(policy, scores.best[2])
        after = [evaluator.evaluate(records, REPORTED) for records in (held_in, held_out)]
        policy.model.save_pretrained(str(draft / "adapter"), selected_adapters=["default"])
        (draft / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty template
        derived_study = derived_run.derived_study(study, out, "improved")
        parents = [parent(run, policy, "policy"), parent(reward_run, judge, "reward")]
        sections = _report_sections(derived_study, policy, scores, before, after, public, settings)
        lineage = combined_lineage(parents)
        sections["derived"]["parents"] = lineage.pop("parents")
        derived_run.write(draft, derived_study, sections | lineage)
    return Run(out)


def _no_better_checkpoint(max_kl: float, settings: RlooSettings) -> Refused:
    return Refused(
        f"no checkpoint with KL ≤ {max_kl:g} nats had a higher KL-penalised reward than the run",
        f"reward - {settings.kl_coef:g} · KL above that of the starting policy",
        "more steps, a smaller learning rate, a larger --max-kl, or a smaller --kl-coef",
    )


def _check(policy: LoadedModel, judge: LoadedModel, run: Run, reward_run: Run) -> Study:
    """Check that `policy`, loaded from `run`, writes text, and that `judge`, loaded from
    `reward_run`, scores answers. Return the plan of `run`. Errors: ConfigError."""
    if not policy.adapted or run.study.objective.resolved.outputs:
        raise ConfigError(
            f"{run.folder}: not a run that can generate text", "a finished run with an adapter"
        )
    if judge.study is None or not judge.study.objective.resolved.scores:
        raise ConfigError(
            f"{reward_run.folder}: no reward model", "a finished run of objective reward"
        )
    return run.study


def _split_prompts(
    prompts: Prompts, policy: LoadedModel, study: Study, settings: RlooSettings
) -> tuple[list[Record], list[Record]]:
    """Split the prompts at random, by the seed, into those to train on and a share HELD_OUT to
    measure on; return both lists in this order. Prompts that are too long are left out, and counted
    in prompts.about.

    - prompts: all public prompts
    - policy: the model that answers, whose positions limit prompt and answer together
    - study: the plan of the run, whose objective.max_length limits them too
    - settings: these give the seed, and the number of tokens to leave for an answer

    Errors: DataError if fewer than 4 fit."""
    room = min(study.objective.max_length, policy.room) - settings.new_tokens
    fit = [
        record
        for record in prompts.records
        if len(prompt_ids(record.prompt, study.objective, policy.tokenizer)) <= room
    ]
    prompts.about["too_long"] = len(prompts.records) - len(fit)
    if len(fit) < 4:
        raise DataError(f"only {len(fit)} prompts leave room for an answer", "at least 4")
    order = np.random.default_rng(settings.seed).permutation(len(fit)).tolist()
    held_out_count = max(1, round(HELD_OUT * len(fit)))
    return [fit[i] for i in order[held_out_count:]], [fit[i] for i in order[:held_out_count]]


def _templated_prompt(record: Record, study: Study) -> str:
    return (study.objective.template or "{text}").replace("{text}", record.prompt)


def _train_both_factors(policy: LoadedModel) -> None:
    """Make both factors trainable, even if the study froze A. Freezing A keeps the sites' noise
    small; here no noise is added, and B alone learns little from so few answers
    (decisions/0018)."""
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _step_callback(
    scores: PolicyScores, evaluator: PolicyEvaluator, records: list[Record]
) -> Callable[[int], bool]:
    def on_step(step: int) -> bool:
        report("improving", step, scores.steps)
        if step % scores.eval_every and step != scores.steps:
            return True
        evaluation = evaluator.evaluate(records, CHOOSING)
        scores.by_step.append((step, evaluation))
        if evaluation.kl > scores.max_kl:
            scores.stopped = f"KL exceeded {scores.max_kl:g} nats after {step} steps"
            return False
        best = scores.best[1] if scores.best else scores.by_step[0][1]
        if evaluation.penalised_reward(scores.kl_coef) > best.penalised_reward(scores.kl_coef):
            scores.best = step, evaluation, _adapter_copy(evaluator.policy)
        return True

    return on_step


def _adapter_copy(policy: LoadedModel) -> dict[str, torch.Tensor]:
    arrays = policy.model.named_parameters()
    return {n: p.detach().clone() for n, p in arrays if "lora_" in n and ".default." in n}


@torch.no_grad()
def _restore(policy: LoadedModel, arrays: dict[str, torch.Tensor]) -> None:
    parameters = dict(policy.model.named_parameters())
    for name, value in arrays.items():
        parameters[name].copy_(value)


# -------------------------------------------------------------------------------- measuring


@dataclass
class PolicyEvaluator:
    """Measures the reward of a policy's answers, and the policy's KL divergence from the policy
    with which the training started.

    - policy, start: the model that trains, and a copy of its start, which does not train
    - judge: scores answers by the reward run
    - study: the plan of the run that trains, for its prompts' template
    - settings: these give the sampled answers' length, temperature and seed
    - mean, spread: mean and standard deviation of the starting policy's rewards, once `centre` has
      set them; before that 0 and 1"""

    policy: LoadedModel
    start: LoadedModel
    judge: RewardJudge
    study: Study
    settings: RlooSettings
    mean: float = 0.0
    spread: float = 1.0

    def centre(self, records: Sequence[Record]) -> PolicyEvaluation:
        """Set `mean` and `spread` to the mean and standard deviation of the starting policy's
        rewards on these public prompts; every reward is then measured from this mean, in units of
        this deviation. Return the starting policy's evaluation. Errors: DataError if no score is
        finite."""
        answers = self._answers(records, CHOOSING)
        scores = [score for score, _ in answers if score is not None]
        if not scores or not np.isfinite(scores).all():
            raise DataError("the reward model gives no finite score to the run's answers")
        self.mean, self.spread = float(np.mean(scores)), float(np.std(scores)) or 1.0
        return self._mean(answers)

    def evaluate(self, records: Sequence[Record], draws: bytes) -> PolicyEvaluation:
        """Sample answers of the policy to the first MAX_EVALUATED of `records`, and evaluate them.
        draws: any bytes, which decide the random draws together with the seed. With the same bytes
        and records, two evaluations differ only because their policies differ."""
        return self._mean(self._answers(records, draws))

    def rewards(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [*map(self._reward, self._scores(prompts, answers))]

    def _mean(self, answers: Sequence[tuple[float | None, float]]) -> PolicyEvaluation:
        scores, divergences = zip(*answers, strict=True)
        rewards = [*map(self._reward, scores)]
        unscored_share = scores.count(None) / len(scores)
        return PolicyEvaluation(
            float(np.mean(rewards)), float(np.mean(divergences)), unscored_share
        )

    def _reward(self, score: float | None) -> float:
        return UNSCORED if score is None else (score - self.mean) / self.spread

    def _scores(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """Return each answer's score by the reward model; None for an answer that is empty or too
        long for that model."""
        passages: dict[int, np.ndarray] = {}
        for at, pair in enumerate(zip(prompts, answers, strict=True)):
            with suppress(Rejected):
                passages[at] = self.judge.passage(*pair)
        scores = self.judge.model.scores_all([*passages.values()])[:, 0] if passages else ()
        by_index = dict(zip(passages, map(float, scores), strict=True))
        return [by_index.get(at) for at in range(len(answers))]

    def _answers(self, records: Sequence[Record], draws: bytes) -> list[tuple[float | None, float]]:
        """Sample SAMPLES answers of the policy to each of the first MAX_EVALUATED records. Return a
        pair (score, KL) for each answer. The score is None if the answer is empty or too long for
        the reward model. The KL at each token is computed exactly, over the whole vocabulary.
        draws: any bytes, which decide the random draws together with the seed."""
        records = records[:MAX_EVALUATED]
        objective = self.study.objective
        settings = self.settings
        tokenizer = self.policy.tokenizer
        prompt_tokens = [prompt_ids(record.prompt, objective, tokenizer) for record in records]
        stream = b"%d\n%d\n%s" % (settings.seed, len(records), draws)
        written = write_all(
            self.policy, prompt_tokens, SAMPLES, settings.new_tokens, stream, settings.temperature
        )
        scored_answers: list[tuple[float | None, float]] = []
        for record, ids, answers in zip(records, prompt_tokens, written, strict=True):
            texts = [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
            sequences = [np.array([*ids, *answer], np.int32) for answer in answers]
            # The positions that predict the answer's tokens and its end.
            at = [np.arange(len(ids) - 1, len(sequence)) for sequence in sequences]
            log_probs = (m.next_tokens_all(sequences, at) for m in (self.policy, self.start))
            kl = [
                float((ours.exp() * (ours - start)).sum())
                for ours, start in zip(*log_probs, strict=True)
            ]
            scored_answers += zip(
                self._scores([record.prompt] * len(texts), texts), kl, strict=True
            )
        return scored_answers


# ---------------------------------------------------------------------------------- report


def _settings(settings: RlooSettings, max_kl: float) -> dict[str, Any]:
    """Return the settings for the report, with the name of the algorithm. In the report kl_coef is
    called "beta", and `max_kl` is called "leash"."""
    named = {{"kl_coef": "beta"}.get(name, name): value for name, value in vars(settings).items()}
    return {**named, "leash": max_kl, "algorithm": "RLOO (trl)"}


def _report_sections(
    study: Study,
    policy: LoadedModel,
    scores: PolicyScores,
    before: Sequence[PolicyEvaluation],
    after: Sequence[PolicyEvaluation],
    prompts: Prompts,
    settings: RlooSettings,
) -> dict[str, Any]:
    """Return the report's sections "base", "adapter", "quality" and "derived" of an improved run.

    - study: the new run's plan
    - policy: the trained model
    - scores: the evaluations during training, with the best one
    - before: the starting policy's evaluations on the training and on the held-out prompts
    - after: the trained policy's evaluations on the same prompts
    - prompts: the public prompts; the report gets the facts about them (prompts.about)
    - settings: the settings of the training"""
    assert scores.best is not None
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
            "by_round": [{"round": at, **vars(row)} for at, row in scores.by_step],
        },
        "derived": {
            "step": "improved",
            "prompts": prompts.about,
            "settings": _settings(settings, scores.max_kl),
            "measured": {
                "steps kept": scores.best[0],
                "ended": scores.stopped,
                "answers without a score, before": before[0].unscored,
                "answers without a score, after": after[0].unscored,
                "reward on prompts held out, before": before[1].reward,
                "reward on prompts held out, after": after[1].reward,
                "KL on prompts held out": after[1].kl,
            },
        },
    }
