"""Whole models made into one, by mergekit: exported folders of one base."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError
from fedtune.models.merge import Method

# mergekit's names; all but slerp work on differences from the base.
_NAMES = {"linear": "task_arithmetic", "ties": "ties", "dare": "dare_linear", "slerp": "slerp"}


def merge_whole(
    base: Path,
    models: Sequence[Path],
    out: Path,
    weights: Sequence[float],
    method: Method,
    density: float,
    seed: int,
) -> None:
    """Merge transformers folders that were fine-tuned from `base` into the folder `out`, fp32.

    Errors: ConfigError (no such method for whole models, or mergekit is missing)."""
    if method not in _NAMES:
        raise ConfigError(
            f"--method {method}: works on adapters", f"one of {', '.join(_NAMES)}",
            "merge the runs themselves, before they are exported",
        )  # fmt: skip
    if method == "slerp" and len(models) != 2:
        raise ConfigError("slerp: an arc has two ends", "two models", "use linear")
    try:
        with warnings.catch_warnings():  # of its own use of NumPy's inner names
            warnings.simplefilter("ignore", DeprecationWarning)
            from mergekit.config import MergeConfiguration
            from mergekit.merge import run_merge
            from mergekit.options import MergeOptions
    except ImportError:
        raise ConfigError(
            "merging whole models needs mergekit, which is not here",
            todo="pip install 'fedtune[merge]', or merge the runs before they are exported",
        ) from None
    logging.getLogger("mergekit").setLevel(logging.ERROR)
    each: list[dict[str, Any]] = [
        {"model": str(model), "parameters": {"weight": weight, "density": density}}
        for model, weight in zip(models, weights, strict=True)
    ]
    body: dict[str, Any] = {
        "merge_method": _NAMES[method],
        "base_model": str(base),
        "models": each,
        "dtype": "float32",
    }
    if method == "slerp":
        share = weights[1] / sum(weights)
        body |= {"base_model": str(models[0]), "parameters": {"t": share}}
        body["models"] = [{"model": str(model)} for model in models]
    else:
        body["parameters"] = {"normalize": False}
    config = MergeConfiguration.model_validate(body)
    options = MergeOptions(
        random_seed=seed, quiet=True, write_model_card=False, copy_tokenizer=False
    )
    run_merge(config, str(out), options)
