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
        chat: True puts the prompt into the model's chat template, False into objective.template, as
            in training. None uses the chat template if the study's evaluation records are
            conversations, or if the study has no evaluation records.
        file: the image or recording, for a base that reads one; None for a base of text alone.

    Returns two texts: the continuation by the base, and that by the base with the adapter. If the
    run is a personal model, the second text begins with a remark that says so. PEFT loads the
    model, as it does for any other user of the adapter.

    Errors: ConfigError if the run has no language model, or the prompt is too long; DataError if
    the file cannot be read; ModelError."""
    return Writer(run)(prompt, max_new_tokens, chat=chat, file=file)


class Writer:
    """Continues prompts with a run's base, and with its base and adapter. The models are loaded at
    the first prompt and stay loaded for further ones. The constructor and a call raise the errors
    of `generate`."""

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
        """Continue a prompt greedily. Return two texts: the continuation by the base, and that by
        the base with the adapter.

        - prompt: the text as a user gives it, without a template
        - max_new_tokens: the most tokens of each continuation
        - chat: True puts the prompt into the model's chat template, False into objective.template.
          None uses the chat template if the study's evaluation records are conversations, or if the
          study has no evaluation records
        - file: the image or recording, for a base that reads one; None for a base of text alone"""
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
    """Let the model continue the tokens in `inputs[start]` greedily. Return the continuation,
    without white space at its ends.

    - model: the base, or the base with the adapter
    - tokenizer: the base's tokenizer
    - inputs: the arguments of model.generate, name -> tensor, for one prompt
    - start: the name in `inputs` of the tokens to continue: "input_ids", for a speech base
      "decoder_input_ids"
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
    """Check that prompt and answer together fit the base's context.

    - prompt_length, max_new_tokens: the number of tokens of the prompt, and of the answer at most
    - most: the number of tokens that the context holds

    Errors: ConfigError if they do not fit."""
    if prompt_length + max_new_tokens > most:
        raise ConfigError(
            f"the prompt has {prompt_length} tokens, and {max_new_tokens} new ones were asked for",
            f"at most {most} together, the base's context",
            "a shorter prompt, or a smaller --max-new-tokens",
        )


def _tokens(
    tokenizer: Any, prompt: str, objective: ObjectiveTable, chat: bool, reader: Reader
) -> dict[str, Any]:
    """Tokenise a prompt. Return a dict of its "input_ids" and "attention_mask", (1, L) each. The
    prompt is put into a chat turn if `chat` is true and the model has a chat template, else into
    objective.template.

    - tokenizer: the base's tokenizer
    - prompt: the text; for a base that reads images or recordings it already holds the tokens that
      stand for the parts of the file
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
    """Prepare a file and its prompt for the base. Return two things: the file's tensor for the
    base's encoder, and the prompt with the tokens that stand for the parts of the file
    (place-holders). For a base that reads text alone, return None and the prompt as it is.

    - reader: knows how this base reads records
    - file: the image or recording; None if none was given
    - prompt: the text; it must not be "" for a base that reads text alone
    - objective: the plan's table, for which the place-holders are put into the prompt

    Errors: ConfigError if the file or the prompt is missing, or a file is given although the base
    reads text alone; DataError if the file is unusable."""
    from fedtune.core.data.media import load
    from fedtune.core.data.records import Record

    if reader.column is None:
        if file is not None:
            raise ConfigError("--file is given, but the base reads text only", "--prompt")
        if not prompt:
            raise ConfigError("no prompt", "--prompt TEXT")
        return None, prompt
    if file is None:
        raise ConfigError(
            f"the base reads {reader.column} and text: no file is given", "--file PATH"
        )
    if not file.is_file():
        raise DataError(f"{file}: no such file", f"a file of {reader.column}")
    try:
        media = load(file, reader.column)
        record, _ = reader.place(Record("", prompt, media=media), objective)
    except Rejected as error:
        raise DataError(f"{file}: {error.reason}") from None
    return reader.tensor(media), record.prompt
