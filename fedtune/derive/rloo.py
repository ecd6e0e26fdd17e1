"""Run trl's RLOO trainer, which trains a language model by reinforcement learning, without trl's
files, trackers and trainer state.

Reference: Ahmadian et al. 2024, "Back to basics", equation 9 (REINFORCE, leave one out)."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedtune.core.bases import wheel
from fedtune.core.errors import ConfigError
from fedtune.core.models.loaded import LoadedModel
from fedtune.derive.settings import RlooSettings

Reward = Callable[[Sequence[str], Sequence[str]], list[float]]  # prompts, answers -> rewards
OnStep = Callable[[int], bool]  # steps done -> whether to continue


def train_rloo(
    policy: LoadedModel,
    prompts: Sequence[tuple[str, str]],
    reward: Reward,
    on_step: OnStep,
    settings: RlooSettings,
) -> None:
    """Train the adapter of `policy` towards a higher reward, in place. The policy is kept near its
    start by a penalty on its KL divergence from a frozen copy of its starting adapter.

    - policy: the loaded run; its parameters with requires_grad are trained
    - prompts: (raw, templated) pairs; the policy gets the templated text, `reward` the raw one
    - reward: is called with a list of raw prompts and a list of answers, one to each prompt;
      returns a list of the answers' rewards
    - on_step: called after each step with the number of steps done so far; training ends if it
      returns False
    - settings: the settings of the steps, of the sampled answers and of the penalty on KL

    Errors: ConfigError if trl is not installed."""
    wheel.silence_libraries()
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import RLOOTrainer
    except ImportError:
        raise ConfigError("trl is not installed", todo="pip install 'fedtune[rl]'") from None

    trained = [p for p in policy.model.parameters() if p.requires_grad]

    def reward_of(completions: list[str], asked: list[str], **_: Any) -> list[float]:
        return reward(asked, completions)

    class StepCallback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= not on_step(int(state.global_step))

    with tempfile.TemporaryDirectory(prefix="fedtune-rl-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = RLOOTrainer(
            model=policy.model,
            processing_class=policy.tokenizer,
            reward_funcs=reward_of,
            train_dataset=Dataset.from_list(
                [{"prompt": templated, "asked": raw} for raw, templated in prompts]
            ),
            optimizers=(torch.optim.AdamW(trained, settings.learning_rate, weight_decay=0.0), None),
            callbacks=[StepCallback()],
            args=_arguments(folder, settings),
        )
        trainer.remove_callback(PrinterCallback)  # it prints at the end, whatever is logged
        trainer.train()
    policy.model.eval()


def _arguments(folder: str, settings: RlooSettings) -> Any:
    """Translate `settings` into trl's RLOOConfig, with which trl writes no checkpoints, logs or
    trackers. folder: an empty folder, which trl requires."""
    from trl import RLOOConfig

    return RLOOConfig(
        output_dir=folder,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.prompts * settings.answers,
        num_generations=settings.answers,
        max_completion_length=settings.new_tokens,
        temperature=settings.temperature,
        top_k=0,
        beta=settings.kl_coef,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        seed=settings.seed,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
