"""A run folder: where it lies, and what is read back from it."""

from __future__ import annotations

from pathlib import Path

from fedtune.config import Study, study_from_json
from fedtune.errors import ConfigError, InputError, ModelError
from fedtune.models.lora import Arrays
from fedtune.models.network import HEAD, Network

ADAPTER = "adapter_model.safetensors"  # PEFT's own name


def load_plan(run: Path) -> Study:
    """The study of a run. Errors: InputError, ConfigError."""
    try:
        return study_from_json((run / "plan.json").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"{run}: not a run folder", "plan.json in it", "name the folder that a run printed"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{run / 'plan.json'}: {error.happened}") from None


def load_adapter(folder: Path, network: Network) -> Arrays:
    """The trainable arrays saved in `folder` (PEFT's format, head.safetensors or both); the frozen
    factor is put into `network`. Errors: ModelError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    found: Arrays = {}
    try:
        if (folder / ADAPTER).is_file():
            for name, value in load_file(folder / ADAPTER).items():
                found[name.removesuffix(".weight") + ".default.weight"] = value
        if (folder / HEAD).is_file():
            found |= {f"head.{name}": value for name, value in load_file(folder / HEAD).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be read ({type(error).__name__})") from None
    if not found:
        raise ModelError(f"{folder}: holds no adapter", f"{ADAPTER} or {HEAD}")
    trained, frozen = network.parameters().keys(), network.frozen_factor().keys()
    if fixed := {name: found[name] for name in frozen if name in found}:
        network.load_frozen(fixed)
    return {name: value for name, value in found.items() if name in trained or name not in frozen}
