"""Save a merged adapter to files that PEFT loads."""

from __future__ import annotations

from pathlib import Path

from fedtune.core.config import Study
from fedtune.core.files.writing import replace
from fedtune.core.models.adapter_files import ADAPTER
from fedtune.core.models.lora import Arrays, name_base


def save_adapter(folder: Path, like: Path, study: Study, arrays: Arrays) -> None:
    """Save an adapter to `folder`, in the files that PEFT writes and loads.

    - folder: where adapter_config.json and adapter_model.safetensors are written; it is made if
      necessary
    - like: the folder of a saved adapter, from whose adapter_config.json all other settings come
    - study: the merged run's plan, whose [lora] gives rank, modules and last layers
    - arrays: A and B of each layer by the network's names, fp32. Their scaling must be 1, since the
      file says alpha = rank

    Errors: OSError."""
    from peft import LoraConfig
    from safetensors.numpy import save

    table = study.lora
    assert table is not None
    config = LoraConfig.from_pretrained(str(like))
    numbers = {int(part) for n in arrays for part in n.split(".") if part.isdigit()}
    config.r = table.rank
    config.lora_alpha = table.rank
    config.use_rslora = False
    config.target_modules = set(table.modules)
    config.layers_to_transform = sorted(numbers) if table.last_layers else None
    name_base(config, config.base_model_name_or_path or study.base.model)
    config.save_pretrained(str(folder))
    body = {n.replace(".default.weight", ".weight"): array for n, array in arrays.items()}
    replace(folder / ADAPTER, save(body, {"format": "pt"}))
