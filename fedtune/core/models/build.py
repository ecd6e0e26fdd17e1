"""Build the network of a study: one per process and setting, shared by simulated sites."""

from __future__ import annotations

import timeit

import torch

from fedtune.core.bases.find import Base, find_base
from fedtune.core.config import LoraTable, QuantisationTable, Study
from fedtune.core.models.network import Network
from fedtune.core.progress import report
from fedtune.core.registry import process_cache


def build(study: Study, base: Base | None = None) -> Network:
    """Build the network of a study. For equal settings this process has one network, which
    simulated sites share.

    - study: the plan
    - base: the base to use; None: the one that the study names, which is downloaded if it is not on
      this machine. For a study that came from elsewhere, give the base: the name in such a study
      must not make this machine download anything

    Errors: ModelError (base missing or of another digest); ConfigError (the base has no module of a
    name in lora.modules)."""
    base = base or find_base(study.base.model, study.base.digest)
    objective = study.objective.resolved
    # The network does not depend on A's values or origin, on the rank that a site trains, or on a
    # preconditioner: studies that differ only in these share it.
    apart = {"a_digest": None, "a_init": "seed", "min_rank": None, "preconditioner": None}
    lora = study.lora and study.lora.model_copy(update=apart)
    dtype, stored = dtype_of(study.base.dtype), study.base.quantisation
    trained = objective.outputs, objective.directions
    return _build(base, dtype, lora, trained, stored, study.base.modality)


@process_cache.cached("networks")
def _build(
    base: Base,
    dtype: torch.dtype,
    lora: LoraTable | None,
    trained: tuple[int, int],
    quantisation: QuantisationTable | None,
    modality: str | None,
) -> Network:
    """Build a network, or return the one that this process built of the same arguments before.

    - base: the base, verified and on this machine
    - dtype: the number format in which the base computes
    - lora: the [lora] table, in which every key that does not change the network has a fixed value,
      so that studies can share the network; None if only a head is trained
    - trained: a pair of numbers: the outputs of the trained head (0: the base's own head is used),
      and the public directions in which class statistics are summed (0: none are sent)
    - quantisation: how the base's weights are stored; None: in `dtype`
    - modality: the study's base.modality; None: the one that fits the base's kind"""
    report(f"loading the base {base.name}")
    outputs, directions = trained
    return Network(base, dtype, lora, outputs, quantisation, modality, directions)


def dtype_of(name: str) -> torch.dtype:
    """Return the number format that `name` stands for; for "auto", bfloat16 if it is faster here,
    else float32."""
    fast = _bf16_is_faster() if name == "auto" else name == "bfloat16"
    return torch.bfloat16 if fast else torch.float32


@process_cache.cached("speed of bf16")
def _bf16_is_faster() -> bool:
    """Return whether bf16 is faster than fp32 here: on a GPU, if PyTorch reports that it supports
    bf16; on a processor with native bf16, by measuring both once per process; on any other
    processor, no."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not torch.cpu._is_avx512_bf16_supported():
        return False

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        return min(timeit.repeat(lambda: left @ right.T, number=1, repeat=7))

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)
