"""The same losses as trl 1.16 on the same tokens: record by record, and their mean.

Where trl couples the records of a batch, what it couples them by is fixed or left out:
| kto  | its batch's divergence, by replacing the estimate                                  |
| orpo | its likelihood term, a mean over the batch's tokens, prompts too: pairs alone and   |
|      | without a prompt                                                                    |"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.data.tokenize import _passage
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives._interface import Objective
from fedtune.core.objectives.dpo import DPO
from fedtune.core.objectives.kto import KTO
from fedtune.core.objectives.orpo import ORPO
from fedtune.core.objectives.reward import Reward, rewards

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # other projects' words to each other
    pytest.mark.skipif(find_spec("trl") is None, reason="trl is in the extra `bench`"),
]

N, MODULES = 5, ["q_proj", "down_proj"]
LORA = LoraTable(rank=4, alpha=8.0, modules=tuple(MODULES))
BETA = 0.5
PROMPTS = [f"fever on day {i}, " + "and a cough " * i for i in range(N)]
PAIRS = [
    {"prompt": p, "chosen": "home " * (i + 1), "rejected": "to the ward, " * (N - i)}
    for i, p in enumerate(PROMPTS)
]
JUDGED = [
    {"prompt": p, "completion": "home " * (i + 1), "label": i % 2 == 0}
    for i, p in enumerate(PROMPTS)
]


def adapter(network: Network) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(2)
    return {
        n: draw.normal(scale=0.3, size=a.shape).astype(np.float32)
        for n, a in sorted(network.trainable().items())
    }


@pytest.fixture(scope="module")
def network(tiny_base: Path) -> Network:
    """The adapter away from zero, so that policy and reference differ."""
    made = Network(find_base(str(tiny_base)), torch.float32, LORA, 0)
    made.load_trainable(adapter(made))
    return made


class Theirs:
    """trl's trainer `kind` with the same base and adapter. Its reference is a copy of the adapter
    as it was given, zero: the study's start."""

    def __init__(
        self, network: Network, folder: Path, kind: str, rows: list[dict[str, Any]], **options: Any
    ) -> None:
        import trl
        from datasets import Dataset as Rows
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        config, trainer = {
            "DPO": (trl.DPOConfig, trl.DPOTrainer),
            "KTO": (trl.KTOConfig, trl.KTOTrainer),
            "ORPO": (ORPOConfig, ORPOTrainer),
        }[kind]
        whole = AutoModelForCausalLM.from_pretrained(network.base.path, dtype=torch.float32)
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules=MODULES, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        asked = config(
            output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, seed=0,
            per_device_train_batch_size=N, gradient_checkpointing=False, **options,
        )  # fmt: skip
        self.trainer = trainer(
            model=get_peft_model(whole, lora), args=asked,
            train_dataset=Rows.from_list(rows), processing_class=network.tokenizer,
        )  # fmt: skip
        with torch.no_grad():
            ours = network.frozen_factor() | network.trainable()
            for name, parameter in self.trainer.model.named_parameters():
                if ".default." in name:
                    parameter.copy_(torch.from_numpy(ours[name]))
        self.trainer.model.eval()
        loader = self.trainer.get_train_dataloader()
        self.batch: dict[str, Any] = next(iter(loader))

    def loss(self, batch: dict[str, Any]) -> float:
        with torch.no_grad():
            return float(self.trainer.compute_loss(self.trainer.model, batch))

    def each(self, rows: int = N) -> list[float]:
        """The loss of one record at a time; a batch holds first the better, then the worse ones."""
        found = []
        for i in range(rows):
            one = {
                k: v[i::rows] if isinstance(v, torch.Tensor) and len(v) % rows == 0 else v
                for k, v in self.batch.items()
            }
            found.append(self.loss(one))
        return found

    def examples(self) -> Dataset:
        """The very tokens of trl's batch."""
        ids, mask, hits = (
            self.batch[k] for k in ("input_ids", "attention_mask", "completion_mask")
        )
        read = [
            _passage(i[m == 1].tolist(), (h[m == 1] == 1).tolist(), False)
            for i, m, h in zip(ids, mask.bool().int(), hits, strict=True)
        ]
        return pairs(read) if len(read) == 2 * N else judged(read, self.batch["label"])


def pairs(read: list[Any]) -> Dataset:
    half = len(read) // 2
    made = [Example(*read[i], -100, i, read[half + i]) for i in range(half)]
    return Dataset(made, half, Counter())


def judged(read: list[Any], labels: Any) -> Dataset:
    both = enumerate(zip(read, labels, strict=True))
    made = [Example(*passage, int(label), i) for i, (passage, label) in both]
    return Dataset(made, len(made), Counter())


def ours(network: Network, data: Dataset, objective: Objective) -> list[float]:
    found = torch.empty(len(data.examples))
    with torch.no_grad():
        for batch in CachedDataset(network, data).batches(range(len(found))):
            found[batch.index] = objective.losses(network, batch)
    return found.tolist()


def agree(mine: list[float], each: list[float], mean: float) -> None:
    # Sums of some 200 nats in fp32: a few units of the fifth digit.
    assert mine == pytest.approx(each, rel=1e-4)
    assert float(np.mean(mine)) == pytest.approx(mean, rel=1e-4)
    assert float(np.std(mine)) > 1e-3  # records that differ, so that a mix-up shows


@pytest.fixture
def theirs(network: Network, tmp_path: Path) -> Iterator[Callable[..., Theirs]]:
    yield lambda *a, **o: Theirs(network, tmp_path, *a, **o)


def test_dpo(network: Network, theirs: Callable[..., Theirs]) -> None:
    trl = theirs("DPO", PAIRS, beta=BETA, loss_type="sigmoid")
    agree(ours(network, trl.examples(), DPO(beta=BETA)), trl.each(), trl.loss(trl.batch))


def test_ipo(network: Network, theirs: Callable[..., Theirs]) -> None:
    """trl divides each completion's log-ratio by its own tokens; so do we."""
    trl = theirs("DPO", PAIRS, beta=BETA, loss_type="ipo")
    mine = ours(network, trl.examples(), DPO(beta=BETA, variant="ipo"))
    agree(mine, trl.each(), trl.loss(trl.batch))


def test_conservative_dpo(network: Network, theirs: Callable[..., Theirs]) -> None:
    """trl 1.16 has no such loss; what it has says it: with s the smoothing, a = -(1-s) log σ(βh)
    and b = -s log σ(-βh), "sigmoid" gives a/(1-s), "robust" (a-b)/(1-2s), and ours is a + b."""
    s = 0.2
    plain = theirs("DPO", PAIRS, beta=BETA, loss_type="sigmoid")
    robust = theirs("DPO", PAIRS, beta=BETA, loss_type="robust", label_smoothing=s)

    def combined(sigmoid: float, robust: float) -> float:
        return 2 * (1 - s) * sigmoid - (1 - 2 * s) * robust

    data = plain.examples()
    assert [e.input_ids.tolist() for e in data.examples] == [
        e.input_ids.tolist() for e in robust.examples().examples
    ]
    mine = ours(network, data, DPO(beta=BETA, label_smoothing=s))
    each = [combined(*both) for both in zip(plain.each(), robust.each(), strict=True)]
    agree(mine, each, combined(plain.loss(plain.batch), robust.loss(robust.batch)))


@pytest.mark.parametrize("z", [0.0, 1.5])
def test_kto_with_its_divergence_fixed(
    network: Network, theirs: Callable[..., Theirs], monkeypatch: pytest.MonkeyPatch, z: float
) -> None:
    trl = theirs("KTO", JUDGED, beta=BETA, desirable_weight=1.3, undesirable_weight=0.7)
    estimates: list[float] = []

    def fixed(model: Any, batch: Any) -> torch.Tensor:
        """What trl takes the mean of, minus the same of the reference: z in the difference."""
        estimates.append(0.0)
        return torch.full((len(batch["label"]),), z if len(estimates) % 2 else 0.0)

    objective = KTO(beta=BETA, reference_point=z, lambda_desirable=1.3, lambda_undesirable=0.7)
    mine = ours(network, trl.examples(), objective)
    as_it_comes = trl.loss(trl.batch)
    monkeypatch.setattr(trl.trainer, "_compute_kl_logps", fixed)
    agree(mine, trl.each(), trl.loss(trl.batch))
    assert as_it_comes != pytest.approx(float(np.mean(mine)), rel=1e-5) or z == 0.0


def test_orpo(network: Network, theirs: Callable[..., Theirs]) -> None:
    """The odds on whole pairs; the whole loss on pairs whose prompt is a start token alone, which
    trl's mean over all tokens then leaves out."""
    trl = theirs("ORPO", PAIRS, beta=BETA, max_length=128)
    found = []
    for which in ("chosen", "rejected"):
        names = (f"{which}_{k}" for k in ("input_ids", "attention_mask", "labels"))
        ids, mask, labels = (trl.batch[name] for name in names)
        found += [
            _passage(i[m == 1].tolist(), (t[m == 1] != -100).tolist(), False)
            for i, m, t in zip(ids, mask, labels, strict=True)
        ]
    data = pairs(found)
    mine = ours(network, data, ORPO(weight=BETA))
    only_likelihood = ours(network, data, ORPO(weight=0.0))
    with torch.no_grad():
        better, worse, *_ = trl.trainer.concatenated_forward(trl.trainer.model, trl.batch)
        odds = -trl.trainer.odds_ratio_loss(better, worse)[0]
    agree(
        [a - b for a, b in zip(mine, only_likelihood, strict=True)],
        odds.tolist(), float(odds.mean()),
    )  # fmt: skip
    assert only_likelihood == pytest.approx((-better).tolist(), rel=1e-5)
    bare = [([1, *t.target_ids[t.target_ids != -100].tolist()]) for t in found]
    short = pairs([_passage(ids, [False, *[True] * (len(ids) - 1)], False) for ids in bare])
    each = []
    for better_ids, worse_ids in zip(bare[:N], bare[N:], strict=True):
        one = {}
        for which, ids in (("chosen", better_ids), ("rejected", worse_ids)):
            one[f"{which}_input_ids"] = torch.tensor([ids])
            one[f"{which}_attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
            one[f"{which}_labels"] = torch.tensor([[-100, *ids[1:]]])
        with torch.no_grad():
            each.append(float(trl.trainer.get_batch_loss_metrics(trl.trainer.model, one)[0]))
    assert ours(network, short, ORPO(weight=BETA)) == pytest.approx(each, rel=1e-5)


@pytest.mark.parametrize(("margin", "centring"), [(0.0, 0.0), (0.5, 0.1)])
def test_a_reward_models_loss(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, margin: float, centring: float
) -> None:
    """trl's own loss function, on scores that our head gave."""
    from collections import defaultdict
    from types import SimpleNamespace

    from trl import RewardTrainer

    made = Network(find_base(str(tiny_base)), torch.float32, LORA, 1)
    made.load_trainable(adapter(made))
    draw = np.random.default_rng(3)
    read = [
        _passage(draw.integers(3, 280, size=6 + i).tolist(), [False] * (6 + i), True)
        for i in range(2 * N)
    ]
    data = pairs(read)
    mine = ours(made, data, Reward(margin=margin, centring=centring))
    scores = torch.empty(2, N, 1)
    with torch.no_grad():
        for batch in CachedDataset(made, data).batches(range(N)):
            scores[:, batch.index] = rewards(made, batch).view(-1, 2).T[:, :, None]

    def theirs(rows: list[int]) -> float:
        same = SimpleNamespace(
            model=SimpleNamespace(training=False),
            args=SimpleNamespace(center_rewards_coefficient=centring or None),
            accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
        )
        inputs = {"margin": torch.full((len(rows),), margin)} if margin else {}
        model = lambda **_: SimpleNamespace(logits=scores[:, rows].flatten(0, 1))  # noqa: E731
        return float(RewardTrainer.compute_loss(same, model, inputs))

    agree(mine, [theirs([i]) for i in range(N)], theirs(list(range(N))))
