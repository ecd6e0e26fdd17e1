"""Load complete models as users do: a base in transformers, a run's adapter by PEFT, and a run's
head.

They serve scores and soft targets, one record at a time: no result of a record depends on other
records."""

from __future__ import annotations

import hashlib
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
from fedtune.core.bases.architecture import pool_states, positions_of, rows_of
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
from fedtune.core.config import BaseTable, Study
from fedtune.core.errors import ModelError
from fedtune.core.files.reading import regular
from fedtune.core.models import lora
from fedtune.core.models.adapter_files import ADAPTER, AGAIN, load_adapter
from fedtune.core.models.cache import check_tokens
from fedtune.core.run_folder import BASE, load_plan

PLAN = "plan.json"


@dataclass(frozen=True, repr=False, eq=False)
class LoadedModel:
    """A base or run, ready to use.

    model: a transformers model, or a PeftModel around it, in eval mode; head: the trained head, if
    the run has one; study: the run's plan; digest: of everything that it computes with."""

    base: Base
    model: Any
    tokenizer: PreTrainedTokenizerBase
    head: nn.Linear | None
    study: Study | None
    digest: str

    @torch.no_grad()
    def next_tokens(self, ids: np.ndarray, at: np.ndarray) -> torch.Tensor:
        """Compute log-probabilities of the tokens after the positions `at` of `ids`, (n, V)
        fp32."""
        return next(self.next_tokens_all([ids], [at]))

    @torch.no_grad()
    def next_tokens_all(
        self, passages: Sequence[np.ndarray], at: Sequence[np.ndarray]
    ) -> Iterator[torch.Tensor]:
        """Compute next-token log-probabilities of several passages in one pass, for public text
        only."""
        weight = self._inner.lm_head.weight
        for states, places in zip(self._states(passages)[0], at, strict=True):
            chosen = states[torch.from_numpy(places)]
            yield torch.log_softmax((chosen @ weight.T).float(), dim=1)

    @torch.no_grad()
    def scores(self, ids: np.ndarray) -> torch.Tensor:
        """Compute the head's logits for one passage, (outputs,) fp32. Errors: ModelError (no
        head)."""
        return self.scores_all([ids])[0]

    @torch.no_grad()
    def scores_all(self, passages: Sequence[np.ndarray]) -> torch.Tensor:
        """Score several passages in one pass, (n, outputs), for public text only."""
        if self.head is None:
            raise ModelError(f"{self.base.name}: has no trained head", "a run that trained one")
        logits: torch.Tensor = self.head(pool_states(*self._states(passages), self.base.kind))
        return logits

    @torch.no_grad()
    def hidden(self, ids: np.ndarray) -> torch.Tensor:
        """Compute last hidden states of one passage, (L, H)."""
        return self._states([ids])[0][0]

    @property
    def adapted(self) -> bool:
        return self._inner is not self.model

    @property
    def room(self) -> int:
        """Return the base's number of positions; a huge number if its config does not say."""
        found = positions_of(self._inner.model if self.base.kind == "causal" else self._inner)
        return found or room(self._inner)

    @property
    def _inner(self) -> Any:
        """Return the transformers model, with the adapter in it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def _states(self, passages: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute last hidden states (n, L, H), and the mask of each passage's own tokens."""
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
    trainable: bool = False,
    sent: bool = False,
) -> LoadedModel:
    """Load the base or the run folder that `source` names. sent: whether the run was received,
    so that its base is found by digest, or is in the run itself.

    Guarantee: with `digest` given, a model that computes anything else is refused. Errors:
    ModelError (not found, another digest, or it cannot be loaded), ConfigError (plan.json);
    PolicyRefused (sent, and its base is not on this machine)."""
    run = place_of(str(source))
    study = load_plan(run) if (run / PLAN).is_file() else None
    if study and sent:
        model, inside = study.base.model, str(run / BASE)
        base = base_of_plan(study.base.digest, inside if model == inside else None)
    else:
        base = find_base(study.base.model, study.base.digest) if study else find_base(str(source))
    adapter = run / "adapter" if study else None
    actual_digest = digest_of(base, adapter, study.base if study else None)
    if digest is not None and digest != actual_digest:
        raise ModelError(
            f"{base.name if adapter is None else run}: the digest here is {actual_digest}",
            digest,
            "use the copy that the digest was taken of",
        )
    if adapter is not None:
        known_here.note(cache_dir(), actual_digest, run.name, run)
    network: Any = load_backbone(base, dtype)
    if base.kind == "causal":
        network.lm_head.register_forward_pre_hook(_in_one_piece)
    if study is not None and study.base.quantisation:
        round_weights(network, study.base.quantisation, getattr(torch, study.base.dtype))
    head = None
    if adapter is not None:
        if (adapter / ADAPTER).is_file():
            network = load_peft_adapter(network, adapter, trainable)
        head = _head(adapter)
    return LoadedModel(base, network, load_tokenizer(base), head, study, actual_digest)


def digest_of(base: Base, adapter: Path | None, asked: BaseTable | None = None) -> str:
    """Return the base's digest; with an adapter folder, a digest of the base, of all arrays in
    the folder, and of the quantisation of the base, if there is one."""
    if adapter is None:
        return base.digest
    both = f"{base.digest}\n{lora.digest(load_adapter(adapter))}"
    if asked and asked.quantisation:
        both += f"\n{asked.dtype} {asked.quantisation.model_dump_json()}"
    return "sha256:" + hashlib.sha256(both.encode()).hexdigest()


def _in_one_piece(_: nn.Module, states: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Make the head's input contiguous. transformers passes a view of each passage's last state,
    for which PyTorch copies the head's whole weight for each passage: 2.7 GB for 48 of SmolLM2, and
    most of writing's time."""
    return (states[0].contiguous(),)


def room(model: Any) -> int:
    """Return a transformers model's number of text positions; a huge number if not declared."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31))


def load_peft_adapter(model: Any, adapter: Path, trainable: bool = False) -> Any:
    """Load the adapter in a folder onto `model`, by PEFT. Errors: ModelError."""
    from peft import PeftModel

    for name in ("adapter_config.json", ADAPTER):
        regular(adapter / name, "an adapter as PEFT saves it", AGAIN, ModelError)
    try:
        loaded = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except Exception as error:  # PEFT may raise anything on a file with values of other types
        raise ModelError(
            f"{adapter}: PEFT cannot load it ({type(error).__name__})", todo=AGAIN
        ) from None
    return loaded.eval()


def _head(adapter: Path) -> nn.Linear | None:
    arrays = {n: v for n, v in load_adapter(adapter).items() if n.startswith("head.")}
    if not arrays:
        return None
    outputs, inputs = arrays["head.weight"].shape
    head = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[f"head.{name}"]))
    return head.requires_grad_(False)
