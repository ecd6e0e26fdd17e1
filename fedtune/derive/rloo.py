"""trl's RLOO trainer, driven without its files, trackers and trainer state.

Reference: Ahmadian et al. 2024, "Back to basics", equation 9 (REINFORCE, leave one out)."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedtune.bases import wheel
from fedtune.derive.settings import RlooSettings
from fedtune.errors import ConfigError
from fedtune.models.loaded import LoadedModel

Reward = Callable[[Sequence[str], Sequence[str]], list[float]]  # prompts, answers -> rewards
Look = Callable[[int], bool]  # after so many steps: go on?


def improve_by(
    policy: LoadedModel,
    prompts: Sequence[tuple[str, str]],
    reward: Reward,
    look: Look,
    how: RlooSettings,
) -> None:
    """Train `policy`'s adapter in place; `prompts`: each as it stands, and as the model reads it.
    The policy at the start is the reference of the KL, a frozen copy of its adapter.

    Errors: ConfigError (trl is not installed)."""
    wheel.quiet()
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import RLOOTrainer
    except ImportError:
        raise ConfigError("trl is not installed", todo="pip install 'fedtune[rl]'") from None

    trained = [p for p in policy.model.parameters() if p.requires_grad]

    def scored(completions: list[str], asked: list[str], **_: Any) -> list[float]:
        return reward(asked, completions)

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= not look(int(state.global_step))

    with tempfile.TemporaryDirectory(prefix="fedtune-rl-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = RLOOTrainer(
            model=policy.model,
            processing_class=policy.tokenizer,
            reward_funcs=scored,
            train_dataset=Dataset.from_list(
                [{"prompt": seen, "asked": raw} for raw, seen in prompts]
            ),
            optimizers=(torch.optim.AdamW(trained, how.learning_rate, weight_decay=0.0), None),
            callbacks=[Watching()],
            args=_arguments(folder, how),
        )
        trainer.remove_callback(PrinterCallback)  # it prints at the end, whatever is logged
        trainer.train()
    policy.model.eval()


def _arguments(folder: str, how: RlooSettings) -> Any:
    """trl's settings: no file, log or tracker of its own."""
    from trl import RLOOConfig

    return RLOOConfig(
        output_dir=folder,
        max_steps=how.steps,
        per_device_train_batch_size=how.prompts * how.answers,
        num_generations=how.answers,
        max_completion_length=how.new_tokens,
        temperature=how.temperature,
        top_k=0,
        beta=how.kl_coef,
        learning_rate=how.learning_rate,
        lr_scheduler_type="constant",
        seed=how.seed,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
