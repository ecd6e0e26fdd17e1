"""Generate text with the base alone and with a run's adapter."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.core.data.chat import render as render_chat
from fedtune.core.data.files import Rejected
from fedtune.core.errors import ConfigError, DataError
from fedtune.runs.run import Run

if TYPE_CHECKING:
    import torch

    from fedtune.core.config import ObjectiveTable
    from fedtune.core.data.reader import Reader


def generate(
    run: Run,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    chat: bool | None = None,
    file: Path | None = None,
) -> tuple[str, str]:
    """Continue a prompt greedily, by the base alone and by the base with a run's adapter.

    Args:
        run: a finished run of a language model.
        prompt: the text as a user gives it, without a template.
        max_new_tokens: the most tokens of each continuation.
        chat: whether to put the prompt into the model's chat template; if not, it is put into
            objective.template, as in training. None: use the chat template if the study's
            evaluation records are conversations, or if it has no such records.
        file: the image or recording, for a base that reads one; None for a base of text alone.

    Returns two texts, the base's and the adapter's. If the run is a personal model, the second text
    begins with a remark that says so. PEFT loads the model, as for any other user of the adapter.

    Errors: ConfigError (no language model, or the prompt is too long), DataError (file),
    ModelError."""
    return Writer(run)(prompt, max_new_tokens, chat=chat, file=file)


class Writer:
    """Continues prompts with a run's base and adapter, which are loaded at the first prompt and
    stay loaded for further ones. The constructor and a call raise the same errors as `generate`."""

    def __init__(self, run: Run) -> None:
        from fedtune.core import modalities
        from fedtune.core.bases.find import find_base, load_tokenizer

        self._run, study = run, run.study
        self._base = base = find_base(study.base.model, study.base.digest)
        if base.kind == "encoder" or study.objective.resolved.outputs:
            raise _not_a_language_model(run.place)
        self._tokenizer: Any = load_tokenizer(base)
        self._reader = modalities.reader(base, self._tokenizer, study.base.modality)

    def __call__(
        self,
        prompt: str,
        max_new_tokens: int,
        *,
        chat: bool | None = None,
        file: Path | None = None,
    ) -> tuple[str, str]:
        """Continue a prompt, and return two texts: the base's, and the base's with the adapter. The
        parameters are those of `generate`."""
        import torch

        from fedtune.core.bases.architecture import inputs as media_inputs
        from fedtune.core.models.loaded import room

        study = self._run.study
        media, prompt = _media_and_prompt(self._reader, file, prompt, study.objective)
        backbone, model = self._models
        if chat is None:
            chat = study.evaluation is None or bool(study.evaluation.columns.messages)
        inputs = _tokens(self._tokenizer, prompt, study.objective, chat, self._reader)
        _check_room(inputs["input_ids"].shape[1], max_new_tokens, room(backbone))
        if media is not None:
            inputs |= media_inputs(backbone, self._base.kind, media, inputs["input_ids"])
        start = "input_ids"
        if self._base.kind == "speech":  # the decoder reads the text, and the encoder the sound
            start = "decoder_input_ids"
            inputs = {"input_features": inputs["input_features"], start: inputs["input_ids"]}
        asked = (self._tokenizer, inputs, start, max_new_tokens)
        with torch.no_grad():
            after = f"{self._run.mark} {_completion(model, *asked)}".strip()
            with model.disable_adapter():
                return _completion(model, *asked), after

    @cached_property
    def _models(self) -> tuple[Any, Any]:
        """Load and return two models: the base, and the base with the adapter."""
        import torch

        from fedtune.core.bases.find import load_backbone

        stored = self._run.study.base
        backbone: Any = load_backbone(self._base, torch.float32)
        if stored.quantisation:
            from fedtune.core.bases.quantise import round_weights

            round_weights(backbone, stored.quantisation, getattr(torch, stored.dtype))
        return backbone, self._run.load_peft(backbone)


def _completion(
    model: Any, tokenizer: Any, inputs: dict[str, Any], start: str, max_new_tokens: int
) -> str:
    """Return the model's greedy continuation of the tokens under `start`, without white space at
    its ends.

    - model: the base with its adapter, on or off
    - tokenizer: the base's
    - inputs: the arguments of model.generate, name -> tensor, for one prompt
    - start: which of them is continued: "input_ids", on a speech base "decoder_input_ids"
    - max_new_tokens: the most tokens of the continuation"""
    out = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = out[0, inputs[start].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def _not_a_language_model(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder}: this run trained a head, which writes no text",
        "a run of an objective on text, such as causal_lm or dpo",
        f"`fedtune predict {folder} --data FILE` uses it, `fedtune evaluate` measures it",
    )


def _check_room(prompt_length: int, max_new_tokens: int, most: int) -> None:
    """Check that prompt and answer fit the base's context. prompt_length, max_new_tokens: their
    numbers of tokens; most: that of the context. Errors: ConfigError."""
    if prompt_length + max_new_tokens > most:
        raise ConfigError(
            f"the prompt has {prompt_length} tokens, and {max_new_tokens} new ones were asked for",
            f"at most {most} together, the base's context",
            "a shorter prompt, or a smaller --max-new-tokens",
        )


def _tokens(
    tokenizer: Any, prompt: str, objective: ObjectiveTable, chat: bool, reader: Reader
) -> dict[str, Any]:
    """Return the prompt's "input_ids" and "attention_mask", (1, L). The prompt is put into a chat
    turn if `chat` is set and the model has a chat template, else into objective.template.

    - tokenizer: the base's
    - prompt: with place-holders, for a base that reads files
    - objective: the plan's table, for the template
    - chat: whether to use the chat template
    - reader: says whether the prompt begins with the base's start tokens already"""
    if chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs = render_chat(
            tokenizer, turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        text = (objective.template or "{text}").replace("{text}", prompt)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not reader.starts)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _media_and_prompt(
    reader: Reader, file: Path | None, prompt: str, objective: ObjectiveTable
) -> tuple[torch.Tensor | None, str]:
    """Return the media tensor of `file` for the base's encoder, and the prompt with place-holders;
    None and the prompt as it is for a base that reads text alone.

    - reader: the base's way of reading records
    - file: the image or recording; None if none was given
    - prompt: the text; for a base that reads text alone not ""
    - objective: the plan's table, for which the place-holders are put into the prompt

    Errors: ConfigError (file or prompt is missing, or a file too many), DataError (file)."""
    from fedtune.core.data.media import load
    from fedtune.core.data.records import Record

    if reader.column is None:
        if file is not None:
            raise ConfigError("--file is given, but the base reads text only", "--prompt")
        if not prompt:
            raise ConfigError("no prompt", "--prompt TEXT")
        return None, prompt
    if file is None:
        raise ConfigError(f"the base reads {reader.column} and text", "--file PATH")
    if not file.is_file():
        raise DataError(f"{file}: no such file", f"a file of {reader.column}")
    try:
        media = load(file, reader.column)
        record, _ = reader.place(Record("", prompt, media=media), objective)
    except Rejected as error:
        raise DataError(f"{file}: {error.reason}") from None
    return reader.tensor(media), record.prompt
