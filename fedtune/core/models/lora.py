"""Attach the adapter: PEFT's LoRA with A frozen and only B trained by default (FFA-LoRA).

With A fixed and shared, the mean of the sites' B is exactly the mean of their updates B·A, updates
are half as large, and noise never multiplies noise (Sun et al. 2024, section 3)."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fedtune.core.bases.architecture import PROJECTOR, Components
from fedtune.core.config import LoraTable
from fedtune.core.config.known_bases import upstream_of
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.models import preconditioner
from fedtune.core.wire.codec import digest as digest

Arrays = dict[str, np.ndarray]


def attach(
    model: PreTrainedModel, lora: LoraTable, base_name: str, parts: Components | None = None
) -> PeftModel:
    """Attach PEFT's LoRA to `model`, with B zero, and return the PeftModel. Only B is trainable, or
    A and B if lora.train is "AB".

    - model: the base's transformers model; its layers are changed in place
    - lora: the plan's [lora] table: rank, alpha, modules, and which blocks and factors
    - base_name: the base's name as the study gives it, for the adapter's PEFT config
    - parts: the model's text model, tower and projector; None: the model is the text model. A tower
      never gets an adapter

    Errors: ConfigError if a named module does not exist in this architecture, or it has fewer
    blocks than lora.last_layers."""
    text = parts.text if parts else model
    layers, targets = None, list(lora.modules)
    if lora.last_layers is not None:
        total = blocks(text)
        if lora.last_layers > total:
            raise ConfigError(
                f"lora.last_layers = {lora.last_layers} is more blocks than this base has",
                f"at most {total}",
            )
        layers = list(range(total - lora.last_layers, total))
    if parts and parts.tower:
        targets, layers = _by_name(model, parts, lora, layers), None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # PEFT says int and computes with a float
        target_modules=targets,
        layers_to_transform=layers,
        lora_dropout=0.0,  # a dropout mask would be shared by the rows of a micro-batch
        bias="none",
        use_rslora=lora.variant == "rslora",
        task_type="CAUSAL_LM" if "CausalLM" in type(model).__name__ else None,
    )
    try:
        with warnings.catch_warnings():  # PEFT uses an old name of transformers
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            adapted = get_peft_model(model, config)
    except ValueError:
        raise _not_found(lora, text) from None
    name_base(adapted.peft_config["default"], base_name)
    for name, parameter in adapted.named_parameters():
        is_trained = "lora_B" in name or ("lora_A" in name and lora.train == "AB")
        parameter.requires_grad_(is_trained)
    return adapted


def name_base(config: PeftConfig, base_name: str) -> None:
    """Write the base's name into the config of an adapter, for programs that load it with PEFT;
    fedtune itself reads the run's plan. A base that comes in a Python wheel is named by its id and
    revision on the hub, so that PEFT finds it without fedtune."""
    upstream = upstream_of(base_name)
    config.base_model_name_or_path = upstream.model if upstream else base_name
    config.revision = upstream.revision if upstream else config.revision


def blocks(text: torch.nn.Module) -> int:
    """Return the number of transformer blocks of a text model, each of which can get an adapter."""
    layers = getattr(text, "layers", None)
    if isinstance(layers, torch.nn.ModuleList):
        return len(layers)
    return int(text.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]


def _by_name(
    model: PreTrainedModel, parts: Components, lora: LoraTable, layers: list[int] | None
) -> list[str]:
    """Return the full names of the modules that get an adapter. A name's last part would not do,
    since layers of the tower (the encoder of images or audio) have the same last parts as layers of
    the text model.

    - model: the whole model, in which the names are full
    - parts: its text model, and its projector if it has one
    - lora: the plan's [lora] table, whose `modules` are looked for
    - layers: the numbers of the text model's blocks that get an adapter, from 0; None: all blocks

    Errors: ConfigError if no linear layer has one of these names."""
    named = {id(module): name for name, module in model.named_modules()}
    text, modules = list(parts.text.named_modules()), list[torch.nn.Module]()
    for name in lora.modules:
        if name == PROJECTOR:
            matching = list((parts.projector or torch.nn.Module()).modules())
        else:
            matching = [m for n, m in text if n.rsplit(".", 1)[-1] == name and _within(n, layers)]
        matching = [module for module in matching if isinstance(module, torch.nn.Linear)]
        if not matching:
            raise _not_found(lora, parts.text, *([PROJECTOR] if parts.projector else []))
        modules += matching
    return [named[id(module)] for module in modules]


def _within(name: str, layers: list[int] | None) -> bool:
    """Return whether a module of the text model lies in one of the blocks `layers`; True for every
    module if `layers` is None. name: the module's name in the text model."""
    match = re.match(r"layers\.(\d+)\.", name)
    return layers is None or (match is not None and int(match[1]) in layers)


def _not_found(lora: LoraTable, text: torch.nn.Module, *more: str) -> ConfigError:
    named = text.named_modules()
    linear = {n.rsplit(".", 1)[-1] for n, m in named if isinstance(m, torch.nn.Linear)}
    return ConfigError(
        f"lora.modules = {list(lora.modules)}: not found in this base",
        f"some of {sorted({*linear, *more})}",
    )


def draw(factor: Mapping[str, torch.nn.Parameter], seed: int) -> Arrays:
    """Draw LoRA's A from a public seed, equal on every machine. Return a dict with an array for
    each parameter of `factor`, by its name. Its entries are uniform in [-1/√inputs, 1/√inputs], as
    in PEFT, for a layer with that number of inputs."""
    generator = torch.Generator().manual_seed(seed)
    arrays = {}
    for name in sorted(factor):
        shape = factor[name].shape
        bound = 1 / math.sqrt(shape[1])
        arrays[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator).numpy()
    return arrays


def frozen_of_plan(
    table: LoraTable, factor: Arrays, outputs: Arrays, trained: Mapping[str, nn.Parameter]
) -> Arrays:
    """Check, before a record is read, that frozen arrays that came with a plan are the plan's own:
    LoRA's A, and the preconditioner's factors W or, if it is narrow, U. Return `outputs`, or {} if
    the plan has no preconditioner.

    - table: the plan's [lora] table, which has the digests; a digest that is None is not compared
    - factor: A by name
    - outputs: W or U by name, as received; not read if the plan has no preconditioner
    - trained: the trainable parameters by name; the shapes of W or U follow from their B

    Errors: ModelError if digests, names, shapes or ranges are not the plan's."""
    if table.a_digest not in (None, digest(factor)):
        raise ModelError(
            "the adapter's frozen factor A is not the plan's",
            "the factor whose digest is lora.a_digest",
        )
    wanted = table.preconditioner
    if wanted is None:
        return {}
    expected = {
        preconditioner.name_for(name, narrow=wanted.narrow): (
            len(b),
            preconditioner.rank_of(len(b), wanted.rank),
        )
        for name, b in trained.items()
        if ".lora_B." in name
    }
    if {name: array.shape for name, array in outputs.items()} != expected:
        raise ModelError(
            "the plan's preconditioner does not fit its adapter", "the shapes of the adapter"
        )
    for array in outputs.values():
        if not np.isfinite(array).all():
            raise ModelError("the plan's preconditioner is not finite", "finite numbers")
    for name in trained:
        preconditioner.multiplier_of(name, outputs)
    if wanted.digest not in (None, digest(outputs)):
        raise ModelError(
            "the preconditioner is not the plan's",
            "the preconditioner whose digest is lora.preconditioner.digest",
        )
    return outputs


# Bound on every entry of an adapter, a head or a frozen factor: larger ones amplify the last digits
# of a product into another output.
LARGEST = 1e3


def load_into(parameters: dict[str, nn.Parameter], arrays: Arrays) -> None:
    """Copy arrays into the parameters of the same names. Errors: ModelError if names or shapes
    differ, or an entry is not finite or larger than LARGEST; nothing is loaded then."""
    if set(parameters) != set(arrays):
        raise ModelError(
            "the adapter's tensors have other names than this base's", "an adapter of this plan"
        )
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != arrays[name].shape or not np.isfinite(arrays[name]).all():
            raise ModelError(
                f"adapter tensor {name}: wrong shape or not finite", "an adapter of this plan"
            )
        if np.abs(arrays[name]).max(initial=0.0) > LARGEST:
            raise ModelError(
                f"adapter tensor {name}: an entry is larger than {LARGEST:g}",
                "an adapter that has not diverged",
                "lower training.learning_rate",
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(arrays[name], dtype=np.float32)))
