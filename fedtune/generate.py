"""Let base and adapter write, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError, ModelError
from fedtune.objectives import find
from fedtune.runs import load_plan


def generate(
    run: Path, prompt: str, max_new_tokens: int = 64, *, chat: bool | None = None
) -> tuple[str, str]:
    """(base alone, with the adapter) after `prompt`, greedily; loaded as anybody would, by PEFT.

    chat: put the prompt into the model's chat template; None: where the study's evaluation records
    are conversations, or where it has none; else the prompt goes in as training saw it, in
    objective.template. Errors: ConfigError (no language model), ModelError."""
    import torch
    from peft import PeftModel

    from fedtune.models.base import find_base, load_backbone, load_tokenizer

    study = load_plan(run)
    base = find_base(study.base.model, study.base.digest)
    if base.kind != "causal" or find(study.objective).outputs:
        raise ConfigError(
            f"{run}: this run trained a head, which writes no text",
            "a run of an objective on text, such as causal_lm or dpo",
            f"`fedtune evaluate {run} --data FILE` measures it",
        )
    tokenizer: Any = load_tokenizer(base)
    backbone = load_backbone(base, torch.float32)
    if study.base.quantisation:
        from fedtune.models.quantise import rounded

        rounded(backbone, study.base.quantisation, getattr(torch, study.base.dtype))
    try:
        model: Any = PeftModel.from_pretrained(backbone, str(run / "adapter")).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{run / 'adapter'}: PEFT cannot load it ({type(error).__name__})"
        ) from None
    if chat is None:
        chat = study.evaluation is None or bool(study.evaluation.columns.messages)
    if chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        text = (study.objective.template or "{text}").replace("{text}", prompt)
        inputs = tokenizer(text, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def write() -> str:
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = out[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True)).strip()

    with torch.no_grad():
        after = write()
        with model.disable_adapter():
            return write(), after
