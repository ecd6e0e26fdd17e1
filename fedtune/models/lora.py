"""The adapter: PEFT's LoRA with A frozen and only B trained by default (FFA-LoRA).

With A fixed and shared, the mean of the sites' B is exactly the mean of their updates B·A, half the
bytes travel, and noise never multiplies noise (Sun et al. 2024, section 3)."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from fedtune.config import LoraTable
from fedtune.errors import ConfigError

Arrays = dict[str, np.ndarray]


def attach(model: PreTrainedModel, lora: LoraTable, base_name: str) -> PeftModel:
    """PEFT's LoRA on `model` with B zero; only `lora.train` is trainable.

    Errors: ConfigError when a named module does not exist in this architecture."""
    layers = None
    if lora.last_layers is not None:
        total = model.config.num_hidden_layers
        if lora.last_layers > total:
            raise ConfigError(f"lora.last_layers = {lora.last_layers}", f"at most {total} here")
        layers = list(range(total - lora.last_layers, total))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # PEFT says int and computes with a float
        target_modules=list(lora.modules),
        layers_to_transform=layers,
        lora_dropout=0.0,  # a dropout mask would be shared by the rows of a micro-batch
        bias="none",
        use_rslora=lora.variant == "rslora",
        task_type="CAUSAL_LM" if "CausalLM" in type(model).__name__ else None,
    )
    try:
        with warnings.catch_warnings():  # PEFT asks transformers by an old name; not ours to mend
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            adapted = get_peft_model(model, config)
    except ValueError:
        linear = {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        raise ConfigError(
            f"lora.modules = {list(lora.modules)}: not found in this base",
            f"some of {sorted(linear)}",
        ) from None
    adapted.peft_config["default"].base_model_name_or_path = base_name
    for name, parameter in adapted.named_parameters():
        trains = "lora_B" in name or ("lora_A" in name and lora.train == "AB")
        parameter.requires_grad_(trains)
    return adapted


def draw(factor: Mapping[str, torch.nn.Parameter], seed: int) -> Arrays:
    """A from a public seed, uniform in ±1/√inputs as PEFT draws it; the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name in sorted(factor):
        shape = factor[name].shape
        bound = 1 / math.sqrt(shape[1])
        drawn[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator).numpy()
    return drawn


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, shapes and fp32 bytes, in name order."""
    body = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name], dtype=np.float32)
        body.update(f"{name} {value.shape}\n".encode())
        body.update(value.tobytes())
    return "sha256:" + body.hexdigest()
