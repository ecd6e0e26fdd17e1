"""A student with fewer layers than its base, as a folder that transformers loads.

The layers that go are neighbours: those that, together, turn least what passes through them. The
very last, which prepares the answer, stays.
Reference: Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper layers", section 3.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedtune.errors import ConfigError, ModelError
from fedtune.models.base import Base, load_backbone, load_tokenizer
from fedtune.models.digest import weights
from fedtune.models.mapped import stored_as

KEPT = ("README.md", "LICENSE")
SAMPLE = 32  # texts are enough to choose by


def shallow(base: Base, layers: int, folder: Path, texts: Sequence[list[int]]) -> list[int]:
    """Write `base` with `layers` of its layers to `folder`, in the dtype that it is stored in;
    returns which layers stayed. texts: token ids of public text, by which the layers are chosen.

    Errors: ConfigError (not fewer), ModelError (an architecture without a list of layers)."""
    files, halves = weights(base.path), (torch.bfloat16, torch.float16)
    dtype = next((kind for kind in halves if stored_as(files, kind)), torch.float32)
    model = load_backbone(base, dtype)
    holder, name = _layers(model, base)
    total = len(getattr(holder, name))
    if not 1 < layers < total:
        raise ConfigError(f"--layers {layers}: {base.name} has {total}", f"2 to {total - 1}")
    first = _least(model, base, texts[:SAMPLE], total - layers)
    kept = [*range(first), *range(first + total - layers, total)]
    setattr(holder, name, nn.ModuleList([getattr(holder, name)[at] for at in kept]))
    config: Any = model.config
    for key, value in list(vars(config).items()):  # one entry for each layer
        if isinstance(value, list) and len(value) == total:
            setattr(config, key, [value[at] for at in kept])
    config.num_hidden_layers = layers
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    for each in KEPT:
        if (base.path / each).is_file():
            shutil.copy(base.path / each, folder / each)
    return kept


@torch.no_grad()
def _least(model: Any, base: Base, texts: Sequence[list[int]], gone: int) -> int:
    """The first of the `gone` neighbours that turn a text's states least: of a decoder the last
    token's, which has seen the whole text."""
    turned = []
    for ids in texts:
        found = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        inputs = torch.stack(found[:-1])[:, 0].double()  # of each layer, (layers, L, H)
        inputs = inputs if base.kind == "encoder" else inputs[:, -1:]
        alike = torch.cosine_similarity(inputs[:-gone], inputs[gone:], dim=-1)
        turned.append(alike.clamp(-1, 1).arccos().mean(dim=1))
    return int(torch.stack(turned).mean(dim=0).argmin())


def _layers(model: nn.Module, base: Base) -> tuple[Any, str]:
    """The module that holds the list of layers, and the list's name."""
    for path, name in (("model", "layers"), ("encoder", "layer")):
        holder = getattr(model, path, None)
        if isinstance(getattr(holder, name, None), nn.ModuleList):
            return holder, name
    raise ModelError(f"{base.name}: not an architecture whose layers can be left out")
