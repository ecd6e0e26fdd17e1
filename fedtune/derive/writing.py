"""Generate text with a loaded model. The random draws depend only on bytes that the caller gives
(`stream`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from fedtune.core.errors import ModelError
from fedtune.core.models.loaded import LoadedModel


def write(
    model: LoadedModel,
    ids: list[int],
    count: int,
    new_tokens: int,
    stream: bytes,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Generate `count` continuations of one prompt. Return a list of them, each as token ids
    without the final eos.

    - model: a loaded language model
    - ids: the prompt's token ids
    - new_tokens: the most tokens of a continuation
    - stream: the bytes that determine the random draws
    - temperature: the sampling temperature; 0 for greedy decoding

    Errors: ModelError if the model's outputs are not finite."""
    return write_all(model, [ids], count, new_tokens, stream, temperature)[0]


@torch.no_grad()
def write_all(
    model: LoadedModel,
    prompts: Sequence[list[int]],
    count: int,
    new_tokens: int,
    stream: bytes,
    temperature: float = 1.0,
) -> list[list[list[int]]]:
    """Generate `count` continuations of each of several prompts in one batch. Return one list for
    each prompt; it holds the continuations, each as token ids without the final eos. A batch is
    faster than one prompt at a time (`write`), but the result of a prompt may depend on the other
    prompts, so this is for public prompts only.

    - model: a loaded language model
    - prompts: the token ids of each prompt
    - count: how many continuations of each prompt
    - new_tokens: the most tokens of a continuation
    - stream: the bytes that determine the random draws
    - temperature: the sampling temperature; 0 for greedy decoding

    Errors: ModelError if the model's outputs are not finite."""
    width = max(map(len, prompts))
    pad = model.tokenizer.pad_token_id
    rows = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(stream).digest()[:7], "big"))
        try:
            out = model.model.generate(
                input_ids=rows.to(model.model.device),
                attention_mask=mask.to(model.model.device),
                max_new_tokens=new_tokens,
                num_return_sequences=count,
                pad_token_id=pad,
                **(sampling if temperature else {"do_sample": False}),
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise ModelError(
                f"{model.base.name}: its outputs are not finite",
                "an intact model",
                "fetch or copy it again",
            ) from None
    completions = [_until_eos(model, row[width:].tolist()) for row in out]
    return [completions[at : at + count] for at in range(0, len(completions), count)]


def _until_eos(model: LoadedModel, ids: list[int]) -> list[int]:
    ends = model.model.generation_config.eos_token_id
    ends = {model.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]
