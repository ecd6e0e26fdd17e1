"""Load complete models: a base, the adapter that a run's plan describes, and the run's head.

A loaded model computes scores and soft targets of one record at a time, so that no record's
result depends on other records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from fedtune.core.bases import known_here
from fedtune.core.bases.architecture import parts_of, pool_states, positions_of, rows_of
from fedtune.core.bases.find import (
    Base,
    base_of_plan,
    cache_dir,
    find_base,
    load_backbone,
    load_tokenizer,
    place_of,
)
from fedtune.core.bases.quantise import round_weights
from fedtune.core.config import Study
from fedtune.core.errors import ModelError
from fedtune.core.models import lora
from fedtune.core.models.adapter_files import load_adapter
from fedtune.core.models.cache import check_tokens
from fedtune.core.run_folder import ADAPTER, BASE, load_plan

PLAN = "plan.json"


@dataclass(frozen=True, repr=False, eq=False)
class LoadedModel:
    """A base or run, ready to use.

    - base, tokenizer: the base and its tokenizer
    - model: a transformers model, or a PeftModel around one, in eval mode
    - head: the trained head; None if there is none
    - study: the run's plan; None for a base
    - digest: the base's digest or, for a run, a digest of all that decides its results
      (`digest_of`)"""

    base: Base
    model: Any
    tokenizer: PreTrainedTokenizerBase
    head: nn.Linear | None
    study: Study | None
    digest: str

    @torch.no_grad()
    def next_tokens(self, ids: np.ndarray, at: np.ndarray) -> torch.Tensor:
        """Compute the log-probabilities of all V tokens of the vocabulary as the next token after
        each of n positions, (n, V) fp32. ids: one passage's token ids; at: the positions in it."""
        return next(self.next_tokens_all([ids], [at]))

    @torch.no_grad()
    def next_tokens_all(
        self, passages: Sequence[np.ndarray], at: Sequence[np.ndarray]
    ) -> Iterator[torch.Tensor]:
        """Yield, for each passage, the log-probabilities of all V tokens as the next token after
        each of its n positions, (n, V) fp32. All passages are computed in one pass, so use this for
        public text only.

        - passages: their token ids
        - at: for each passage, the positions in it"""
        for states, places in zip(self._states(passages)[0], at, strict=True):
            yield self._next_token_logp(states[torch.from_numpy(places)])

    @torch.no_grad()
    def next_tokens_by_block(
        self, ids: np.ndarray, at: np.ndarray, rows: int
    ) -> Iterator[torch.Tensor]:
        """Yield what `next_tokens` returns, (n, V), in blocks of at most `rows` of its rows. One
        block is held in memory at a time. If there are no positions, there is one empty block."""
        states = self._states([ids])[0][0][torch.from_numpy(at)]
        for start in range(0, max(1, len(states)), rows):
            yield self._next_token_logp(states[start : start + rows])

    def _next_token_logp(self, states: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax((states @ self._inner.lm_head.weight.T).float(), dim=1)

    @torch.no_grad()
    def scores(self, ids: np.ndarray) -> torch.Tensor:
        """Compute the head's logits for one passage, given as token ids: (outputs,) fp32. Errors:
        ModelError (no head)."""
        return self.scores_all([ids])[0]

    @torch.no_grad()
    def scores_all(self, passages: Sequence[np.ndarray]) -> torch.Tensor:
        """Compute the head's logits for n passages, given as token ids, in one pass: (n, outputs)
        fp32. Use it for public text only. Errors: ModelError (no head)."""
        if self.head is None:
            raise ModelError(f"{self.base.name}: has no trained head", "a run that trained one")
        logits: torch.Tensor = self.head(pool_states(*self._states(passages), self.base.kind))
        return logits

    @torch.no_grad()
    def hidden(self, ids: np.ndarray) -> torch.Tensor:
        """Compute the last hidden states of one passage of L tokens, (L, H). ids: the passage's
        token ids."""
        return self._states([ids])[0][0]

    @property
    def adapted(self) -> bool:
        return self._inner is not self.model

    @property
    def room(self) -> int:
        """Return the most tokens of a text that the base can read; a huge number if its config does
        not say."""
        found = positions_of(self._inner.model if self.base.kind == "causal" else self._inner)
        return found or room(self._inner)

    @property
    def _inner(self) -> Any:
        """Return the transformers model itself, without PEFT's wrapper, but with the adapter in its
        layers."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def _states(self, passages: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the last hidden states of n passages. Return a pair: the states, (n, L, H), and
        the mask (n, L), which is True on a passage's own tokens and False on padding. passages:
        their token ids."""
        inner = self._inner
        causal = self.base.kind == "causal"
        rows = [torch.from_numpy(np.asarray(ids, dtype=np.int64)) for ids in passages]
        known = rows_of(inner.config, inner.get_input_embeddings())
        ids = check_tokens(pad_sequence(rows, batch_first=True), known).to(inner.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(ids)
        backbone = inner.model if causal else inner
        # A position never attends to later ones, so that a causal base needs no mask.
        attention = {} if causal else {"attention_mask": mask}
        return backbone(input_ids=ids, **attention).last_hidden_state, mask.bool()


def load(
    source: str | Path,
    digest: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    sent: bool = False,
) -> LoadedModel:
    """Load the base or the run folder that `source` names.

    - source: a base's name as a study gives it, or the folder of a base or of a finished run
    - digest: the digest that the model must have; None for any
    - dtype: the number format of the base
    - sent: whether the run was received from elsewhere. Its base is then the one in the run's own
      folder, or is found on this machine by digest, never by name

    Guarantee: if `digest` is given, only a model with this digest is loaded. The digest covers all
    that the model computes. Errors: ModelError (not found, another digest, or it cannot be loaded);
    ConfigError (plan.json is not valid); PolicyRefused (sent, and its base is not on this
    machine)."""
    run = place_of(str(source))
    study = load_plan(run) if (run / PLAN).is_file() else None
    if study and sent:
        model, inside = study.base.model, str(run / BASE)
        base = base_of_plan(study.base.digest, inside if model == inside else None)
    else:
        base = find_base(study.base.model, study.base.digest) if study else find_base(str(source))
    arrays = load_adapter(run / ADAPTER) if study else {}
    actual_digest = digest_of(base, study, arrays)
    if digest is not None and digest != actual_digest:
        raise ModelError(
            f"{run if study else base.name}: the digest here is {actual_digest}",
            digest,
            "use the copy that has the expected digest; if an earlier release of fedtune showed "
            "that digest, `fedtune models verify RUN` shows the run's present one"
            if study
            else "use the copy that has the expected digest",
        )
    if study:
        known_here.note(cache_dir(), actual_digest, run.name, run)
    network: Any = load_backbone(base, dtype)
    if base.kind == "causal":
        network.lm_head.register_forward_pre_hook(_in_one_piece)
    if study is not None and study.base.quantisation:
        round_weights(network, study.base.quantisation, getattr(torch, study.base.dtype))
    if study:
        network = _adapted(network, base, study, arrays)
    head = _head(arrays)
    return LoadedModel(base, network, load_tokenizer(base), head, study, actual_digest)


def digest_of(base: Base, study: Study | None, arrays: lora.Arrays) -> str:
    """Return the base's digest or, for a run, a digest of everything that decides its results: the
    base, the adapter and head in `arrays`, and the plan's quantisation, adapter, objective and
    privacy tables."""
    if study is None:
        return base.digest
    plan = study.model_dump(mode="json", include={"lora", "objective", "privacy"})
    if study.base.quantisation:
        plan["base"] = study.base.model_dump(mode="json", include={"dtype", "quantisation"})
    told = {"base": base.digest, "arrays": lora.digest(arrays), "plan": plan}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _adapted(network: Any, base: Base, study: Study, arrays: lora.Arrays) -> Any:
    """Attach the plan's adapter to `network`, as training does, and load `arrays` into it, except
    the head's. Return the network in eval mode, with nothing to train. adapter_config.json is not
    read; it is for other programs that load the adapter.

    - network: the base's transformers model, which is changed
    - base: the base; its kind says which part of the network is the text model
    - study: the run's plan; without [lora] nothing is attached
    - arrays: all arrays of the run's adapter folder, by the network's names

    Errors: ModelError, ConfigError."""
    adapter = {name: array for name, array in arrays.items() if not name.startswith("head.")}
    parameters: dict[str, nn.Parameter] = {}
    if study.lora:
        network = lora.attach(network, study.lora, base.name, parts_of(network, base.kind))
        parameters = {n: p for n, p in network.named_parameters() if ".lora_" in n}
    lora.load_into(parameters, adapter)
    return network.requires_grad_(False).eval()


def _in_one_piece(_: nn.Module, states: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Return the input of a language model's head in contiguous memory, as a tuple of one tensor.
    This is a hook that PyTorch calls before the head, with the head and its input. transformers
    passes a view of each passage's last state. For a view PyTorch copies the head's whole weight
    once per passage: 2.7 GB for 48 passages with SmolLM2, and most of the time that writing text
    takes."""
    return (states[0].contiguous(),)


def room(model: Any) -> int:
    """Return the most tokens of a text that a transformers model can read; a huge number if its
    config does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31))


def _head(arrays: lora.Arrays) -> nn.Linear | None:
    if "head.weight" not in arrays:
        return None
    outputs, inputs = arrays["head.weight"].shape
    head = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[f"head.{name}"]))
    return head.requires_grad_(False)
