"""Compare a site's private epoch over MedQuAD with a usual epoch without privacy.

    python -m benchmarks.epoch --data DATA [--records 200]

trl's SFTTrainer gets the same tokens and targets as ours, the same LoRA, optimiser and dtype, in
batches of 8. Ours draws Poisson batches: as large as private training needs them, and as small as
SFTTrainer's. Each arm in a fresh process; seconds are those of the training loop.
Needs `pip install trl` (`pip install -e .[bench]`). Writes OUT/epoch.md and .json."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, texts
from benchmarks.measure import Bound, Table
from benchmarks.variants import MODULES, RATE, Setting, World, step_log
from fedtune.core.data.dataset import NO_TARGET, Dataset
from fedtune.core.dp.plan import DpPlan
from fedtune.core.models.cache import CachedDataset
from fedtune.core.training.local_round import local_round

SFT, SFT_AGAIN, SFT_DEFAULT = (
    "SFTTrainer",
    "SFTTrainer, checkpointing",
    "SFTTrainer, its defaults (checkpointing, bf16 autocast)",
)
# trl 1.16 sends every position through a head that it fuses, which without a GPU costs more than
# the model's own loss of earlier releases; so that one is shown, and held to the bounds, as well.
SFT_OWN, SFT_OWN_AGAIN = "SFTTrainer, model's own loss", "SFTTrainer, own loss, checkpointing"
OURS, OURS_AGAIN, OURS_SMALL = "ours", "ours, checkpointing", "ours, batches as small"
OTHERS = (SFT, SFT_AGAIN, SFT_OWN, SFT_OWN_AGAIN, SFT_DEFAULT)
ARMS = (SFT, OURS, SFT_OWN, SFT_AGAIN, OURS_AGAIN, SFT_OWN_AGAIN, OURS_SMALL, SFT_DEFAULT)


# --------------------------------------------------------------------------------- SFTTrainer


def sft(setting: Setting, dataset: Dataset, batch: int, arm: str) -> dict[str, float]:
    from datasets import Dataset as Rows
    from peft import LoraConfig
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    class OwnLoss(SFTTrainer):  # type: ignore[misc]
        compute_loss = Trainer.compute_loss

    kind = OwnLoss if arm in (SFT_OWN, SFT_OWN_AGAIN) else SFTTrainer
    world = World(setting, dataset)
    tokenizer = texts.load_tokenizer(texts.find_base(texts.BASE))
    rows = [  # the whole record: trl shifts the labels itself
        {
            "input_ids": [*e.input_ids.tolist(), int(e.target_ids[-1])],
            "labels": [NO_TARGET, *e.target_ids.tolist()],
        }
        for e in dataset.examples
    ]
    with tempfile.TemporaryDirectory() as folder:
        usual: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": batch,
            "num_train_epochs": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": setting.device == "cpu",
        }
        if arm != SFT_DEFAULT:
            usual |= {
                "gradient_checkpointing": arm in (SFT_AGAIN, SFT_OWN_AGAIN),
                "bf16": False,  # no autocast: the base's own dtype, as ours
                "optim": "adamw_torch" if setting.optimizer == "adamw" else "sgd",
                "learning_rate": RATE,
                "lr_scheduler_type": "constant",
            }
        trainer = kind(
            model=world.model,
            args=SFTConfig(**usual),
            train_dataset=Rows.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=setting.rank,
                lora_alpha=2 * setting.rank,
                target_modules=list(MODULES),
                task_type="CAUSAL_LM",
            ),
        )
        for name, parameter in trainer.model.named_parameters():
            if "lora_A" in name and setting.train == "B":
                parameter.requires_grad_(False)
        loaded = measure.reset_peak(setting.device)
        took = measure.seconds(trainer.train, setting.device)
    assert trainer.state.global_step == -(-len(rows) // batch)
    return _figures(took, texts.tokens(dataset), loaded, setting)


# --------------------------------------------------------------------------------------- ours


class Counted:
    """A plan that counts the tokens of the records it drew, since a Poisson epoch draws more or
    fewer than the data set has. Such a count is private; these records are public."""

    def __init__(self, plan: DpPlan, dataset: Dataset) -> None:
        self.plan, self.lengths, self.tokens = plan, [len(e.input_ids) for e in dataset.examples], 0

    def step(self, n_rows: int, dimension: int, gradients: Any, *arguments: Any) -> torch.Tensor:
        def counted(rows: list[int]) -> Iterator[Any]:
            self.tokens += sum(self.lengths[row] for row in rows)
            return gradients(rows)

        return self.plan.step(n_rows, dimension, counted, *arguments)


def ours(
    setting: Setting, dataset: Dataset, expected: int, budget: int | None, arm: str
) -> dict[str, float]:
    network = World(setting, dataset).network()
    number = len(dataset.examples)
    rate = min(1.0, expected / number)
    steps = max(1, round(1 / rate))
    study = texts.study(setting, steps, rate, {"max_length": texts.LONGEST})
    plan = DpPlan(
        study=study.digest,
        unit="record",
        sampling_rate=rate,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="flat",
        gamma=0.01,
        rounds=1,
        local_steps=steps,
        delta=1e-5,
        divisor=rate * number,
    )
    data, counted = CachedDataset(network, dataset), Counted(plan, dataset)
    if budget:
        data.batches = partial(data.batches, token_budget=budget)  # type: ignore[method-assign]
    again = {"recompute": True} if arm == OURS_AGAIN else {}
    adapter, log = network.trainable(), step_log()
    loaded = measure.reset_peak(setting.device)
    took = measure.seconds(
        lambda: local_round(study, data, counted, log, 1, adapter, **again), setting.device
    )
    return _figures(took, counted.tokens, loaded, setting)


def _figures(took: float, tokens: int, loaded: float, setting: Setting) -> dict[str, float]:
    peak = measure.peak(setting.device)
    return {"seconds": took, "tokens": tokens, "base": loaded, "peak": peak}


# -------------------------------------------------------------------------------------- table


def run_arm(chosen: argparse.Namespace) -> dict[str, float]:
    """One arm, in this process."""
    dataset = texts.medquad(chosen.data, chosen.records)
    setting, arm = Setting(**json.loads(chosen.setting)), chosen.arm
    if arm in OTHERS:
        return sft(setting, dataset, chosen.batch, arm)
    expected = chosen.batch if arm == OURS_SMALL else chosen.expected
    return ours(setting, dataset, expected, chosen.budget, arm)


def run(chosen: argparse.Namespace) -> Table:
    setting = Setting(dtype=chosen.dtype, train=chosen.train, device=chosen.device)
    numbers = {key: getattr(chosen, key) for key in ("records", "batch", "expected", "budget")}
    passed = [f"--{key}={value}" for key, value in numbers.items() if value]
    table = Table("epoch", "An epoch over MedQuAD, each arm in a fresh process")
    by_arm: dict[str, dict[str, Any]] = {}
    for arm in chosen.arms:
        began = time.monotonic()
        try:
            by_arm[arm] = measure.fresh(
                "benchmarks.epoch", "--data", str(chosen.data), *passed,
                "--arm", arm, "--setting", setting.text,
            )  # fmt: skip
        except RuntimeError as error:
            table.notes.append(f"{arm}: did not run: {error}")
            continue
        print(f"{arm}: {by_arm[arm]} ({time.monotonic() - began:.0f} s)", flush=True)
    table.rows = [_row(arm, by_arm, setting) for arm in by_arm]
    for off, on, least in ((SFT, SFT_AGAIN, 0.75), (SFT_OWN, SFT_OWN_AGAIN, 0.5)):
        both = _over(by_arm, OURS_AGAIN, on, "peak")
        table.bounds += [
            Bound(f"epoch, time over {off}", _over(by_arm, OURS, off), least),
            Bound(f"epoch, memory over {off}", _over(by_arm, OURS, off, "peak"), 0.8),
            Bound(f"epoch, both checkpoint, memory over {on}", both, 0.8),
        ]
    table.notes.append(_note(chosen))
    return table


def _over(by_arm: dict[str, Any], a: str, b: str, key: str = "seconds") -> float | None:
    """Of time: by token, since a Poisson epoch draws more or fewer of them."""
    if a not in by_arm or b not in by_arm:
        return None
    if key == "peak":
        return float(by_arm[a][key] / by_arm[b][key])
    first, second = (by_arm[arm]["seconds"] / by_arm[arm]["tokens"] for arm in (a, b))
    return float(first / second)


def _row(arm: str, by_arm: dict[str, Any], setting: Setting) -> dict[str, Any]:
    figures = by_arm[arm]
    return {
        "arm": arm,
        "trained": setting.train,
        "seconds": round(figures["seconds"], 1),
        "tokens": figures["tokens"],
        "tokens/s": figures["tokens"] / figures["seconds"],
        "time / SFTTrainer": _over(by_arm, arm, SFT),
        "base, MiB": round(figures["base"]),
        "peak, MiB": round(figures["peak"]),
        "memory / SFTTrainer": _over(by_arm, arm, SFT, "peak"),
        "machine": measure.machine(setting.weights, setting.device),
    }


def _note(chosen: argparse.Namespace) -> str:
    from importlib.metadata import version

    return (
        f"{chosen.records or 'All'} records; trl {version('trl')}, batches of {chosen.batch}; "
        f"ours: Poisson batches of {chosen.expected} expected records (or as small as trl's). "
        "Ratios of time are per token."
    )


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common(parser)
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--records", type=int, help="so many alone (default: all)")
    parser.add_argument("--batch", type=int, default=8, help="SFTTrainer's, per device")
    parser.add_argument("--expected", type=int, default=256, help="ours, expected records")
    parser.add_argument("--budget", type=int, help="positions of a micro-batch of ours")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--train", choices=["AB", "B"], default="AB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    measure.start(chosen)
    if chosen.arm:
        measure.answer(run_arm(chosen))
        return
    if chosen.quick:
        chosen.records, chosen.arms = chosen.records or 12, [OURS, SFT, SFT_OWN]
    table = run(chosen)
    table.save(chosen.out)
    print(table.markdown())


if __name__ == "__main__":
    main()
