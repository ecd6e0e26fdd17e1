"""One copy of the base in memory, cut into a frozen prefix and a trainable part.

Sites and coordinator see the same few methods, whatever the base: states at the cut, hidden states
above it, logits. Adapters are swapped by loading arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from fedtune import modalities
from fedtune.bases.architecture import (
    PROJECTOR,
    fill,
    parts_of,
    plane_positions,
    pooled,
    positions_of,
)
from fedtune.bases.find import Base, load_backbone, load_tokenizer
from fedtune.bases.quantise import quantise
from fedtune.config import LoraTable, QuantisationTable, Study
from fedtune.errors import ConfigError, ModelError
from fedtune.models import lora as lora_module
from fedtune.models.adapter_files import HEAD
from fedtune.models.lora import Arrays, load_into
from fedtune.models.loss import head_loss
from fedtune.models.prefix_store import HiddenStates
from fedtune.models.split import Split, cut


class Network:
    """A frozen base with its adapter or head. Shapes: B records, L positions, H hidden, V classes
    or vocabulary. Adapters and heads are fp32 whatever the base."""

    def __init__(
        self,
        base: Base,
        dtype: torch.dtype,
        lora: LoraTable | None,
        labels: int,
        quantisation: QuantisationTable | None = None,
        modality: str | None = None,
    ) -> None:
        if not lora and not labels:
            raise ConfigError("nothing to train", "a [lora] table, or objective classify or reward")
        self.base, self.dtype, self.kind = base, dtype, base.kind
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(base)
        self.reader = modalities.reader(base, self.tokenizer, modality)
        whole = load_backbone(base, dtype)
        # A processor here unless there is a GPU; CUDA_VISIBLE_DEVICES says which, as anywhere.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: PreTrainedModel | PeftModel = nn.Module.to(whole, self.device)
        if quantisation:
            quantise(whole, quantisation, dtype)
        self._parts = parts_of(whole, base.kind)
        self._backbone, self._lm_head = self._parts.text, self._parts.lm_head
        text = whole.config.get_text_config()
        self.hidden_size, self.vocabulary = int(text.hidden_size), int(text.vocab_size)
        self.head = nn.Linear(self.hidden_size, labels, device=self.device) if labels else None
        if self.head is not None:
            nn.init.zeros_(self.head.weight)  # public, and the same at every site
            nn.init.zeros_(self.head.bias)
        self._split: Split | None = None
        self._projects = lora is not None and PROJECTOR in lora.modules
        if lora:
            if base.kind != "encoder" and not self._projects:
                self._split = cut(self._backbone, lora)
            if self._parts.plane and not self.positionwise:
                self._split = None  # above it, nobody knew where the image stands
            self.model = lora_module.attach(whole, lora, base.name, self._parts)
        self.pooled = not lora  # a head alone: the record's one vector is all that training needs
        # Whether `hidden` fills in the image: its projector is trained, or all of the text runs.
        self._fills = self._projects or (self._parts.plane and not (self.pooled or self._split))
        # States at the cut, and what a tower makes of a file, by what went in; shared by everyone
        # who sees the same record; gone as soon as nobody holds them.
        self.states: WeakValueDictionary[bytes, HiddenStates] = WeakValueDictionary()
        self._adopted: dict[str, Arrays] = {}  # by digest; shared by everyone who trains over it
        self._loaded: tuple[Arrays, list[int]] | None = None  # as A, and A's versions since
        self.draw_factor(seed=0)

    @cached_property
    def positions(self) -> int | None:
        """The most tokens that a text may have for the base; None where it does not say."""
        return positions_of(self._backbone)

    @torch.no_grad()
    def check_length(self, length: int) -> None:
        """Whether the base reads texts of `length` tokens here, seen before any record is read: one
        that is too long would fail, and tell by that how long it is. Errors: ConfigError."""
        if self.positions is not None and length > self.positions:
            raise ConfigError(
                f"objective.max_length = {length} is more than the base can read",
                f"at most {self.positions}, its positions",
            )
        if self.reader.column is not None:
            return
        ids = torch.zeros(1, length, dtype=torch.long)
        mask = torch.ones(1, length, dtype=torch.bool)
        try:
            self.hidden(self.prefix(ids, mask), mask.to(self.device))
        except Exception as error:
            raise ConfigError(
                f"the base cannot read objective.max_length = {length} tokens here "
                f"({type(error).__name__})",
                "a length that it reads on this machine",
            ) from None

    @property
    def cached(self) -> bool:
        """Whether states at the cut are worth keeping (something is frozen below it)."""
        return self.pooled or self._split is not None

    @property
    def positionwise(self) -> bool:
        """Whether above the cut each position stands for itself."""
        return self._split is not None and self._split.positionwise

    @property
    def sees(self) -> bool:
        """Whether the part above the cut reads the tower's states itself."""
        if self.pooled or self.positionwise:
            return False
        return self._fills or self._parts.crossed

    def frames(self, tiles: int) -> int:
        """Count the tower's states of a file with so many tiles; 0 where there is no tower."""
        return self._parts.frames * tiles

    def meets_tiles(self, parameter: nn.Parameter) -> bool:
        """Whether each tile is a row of its layer's input: in the projector; else a passage is."""
        if not self._projects or self._parts.projector is None:
            return False
        return any(parameter is own for own in self._parts.projector.parameters())

    @property
    def trained(self) -> nn.Module:
        """The module that holds every trainable parameter, for the gradient engine to watch."""
        holder = nn.ModuleDict()
        if not self.pooled:
            holder["backbone"] = self._split.tail if self._split else self._backbone
        if self._projects and self._parts.projector is not None:
            holder["projector"] = self._parts.projector
        if self.head is not None:
            holder["head"] = self.head
        return holder

    @torch.no_grad()
    def see(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the frozen tower makes of one file, (tiles, P, W), from its modality's tensor."""
        assert self._parts.tower is not None
        return self._parts.tower(tensor.to(self.device, self.dtype))

    @torch.no_grad()
    def prefix(
        self, input_ids: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States at the cut, (B, L, H); (B, 1, H) fp32 where a head alone is trained. seen: the
        tower's states of each passage's file, (B, tiles, P, W). Where `hidden` fills in what the
        projector makes of them, its places are NaN until then."""
        input_ids, mask = input_ids.to(self.device), mask.to(self.device)
        if self.pooled and self._parts.crossed:
            assert seen is not None  # a head on the tower itself: the mean over all frames
            return pooled(seen[:, 0], torch.ones_like(seen[:, 0, :, 0]), "encoder")[:, None]
        given = {"input_ids": input_ids}
        if self._parts.projector is not None:
            given = {"inputs_embeds": self._embedded(input_ids, seen)}
            given |= self._placed(input_ids == self._parts.place)
        if self.pooled:
            states = self._run(self._backbone, mask, **given, **self._crossed(seen))
            return pooled(states, mask, self.kind)[:, None]
        if self._split:
            return self._run(self._split.prefix, mask, **given, **self._crossed(seen))
        return self._embedded(input_ids, seen)

    def _embedded(self, input_ids: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        embed: nn.Module = self.model.get_input_embeddings()
        states: torch.Tensor = embed(input_ids)
        if self._parts.projector is None:
            return states
        states = states.masked_fill((input_ids == self._parts.place)[:, :, None], torch.nan)
        return states if self._fills else self._filled(states, seen)

    def _placed(self, holes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where each position stands, for a base to which that is more than its number."""
        return {"position_ids": plane_positions(holes)} if self._parts.plane else {}

    def _filled(self, states: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """With what the projector makes of each record's tiles in the places for it."""
        assert seen is not None and self._parts.projector is not None
        features = self._parts.projector(seen.flatten(0, 1))  # (B · tiles, P', H)
        return fill(states, features.reshape(len(seen), -1, features.shape[-1]))

    def _crossed(self, seen: torch.Tensor | None) -> dict[str, torch.Tensor]:
        if not self._parts.crossed:
            return {}
        assert seen is not None
        return {"encoder_hidden_states": seen[:, 0]}

    @property
    def has_head(self) -> bool:
        """Whether a classification head is trained, in place of the model's own."""
        return self.head is not None

    def hidden(
        self,
        prefix: torch.Tensor,
        mask: torch.Tensor,
        keep: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states from the states at the cut, adapters applied, (B, L, H); only those at
        the positions `keep` (B, K), if given, (B, K, H). seen: as in `prefix`, where `sees`."""
        if self.pooled:
            return prefix
        more = self._crossed(seen) if self.sees else {}
        if self._fills:
            more |= self._placed(prefix[..., 0].isnan())
            prefix = self._filled(prefix, seen)
        tail = self._split.tail if self._split else self._backbone
        if keep is None:
            return self._run(tail, mask, inputs_embeds=prefix, **more)
        if self._split and self._split.narrows:
            return self._run(tail, mask, inputs_embeds=prefix, keep=keep, **more)
        whole = self._run(tail, mask, inputs_embeds=prefix, **more)
        return whole.gather(1, keep[:, :, None].expand(-1, -1, whole.shape[2]))

    def logits(self, selected: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Selected states (n, H) to next-token logits (n, V) fp32, over `tokens` alone if given;
        where a head is trained, its class logits."""
        if self.head is not None:
            scores: torch.Tensor = self.head(selected.float())
            return scores
        assert self._lm_head is not None
        weight: torch.Tensor = self._lm_head.weight  # type: ignore[assignment]
        if tokens is not None:
            selected, weight = selected.float(), weight[tokens].float()
        found: torch.Tensor = (selected @ weight.T).float()
        return found

    def token_losses(self, selected: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood (nats) of next tokens, from selected states (n, H); fp32 (n,)."""
        assert self._lm_head is not None
        return head_loss(selected, self._lm_head.weight, targets)  # type: ignore[arg-type]

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One vector per record (B, H) fp32: mean over tokens (encoder) or the last one.
        A head alone on a speech base: the mean over the tower's frames."""
        return hidden[:, 0] if self.pooled else pooled(hidden, mask, self.kind)

    def _run(self, part: nn.Module, mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        # Records are padded on the right, so in a causal base no token can see padding: leaving
        # the mask out lets attention take its fast path and changes no real position.
        causal = self.kind != "encoder"
        extra = {"use_cache": False} if causal else {"attention_mask": mask.long()}
        states: torch.Tensor = part(**inputs, **extra).last_hidden_state
        return states

    @contextmanager
    def recomputing(self, wanted: bool) -> Iterator[None]:
        """If wanted, blocks with an adapter keep their inputs alone and run again in the backward
        pass: the memory of one block for a third more time. The same gradients."""
        blocks = [m for m in self.trained.modules() if isinstance(m, GradientCheckpointingLayer)]
        blocks = [m for m in blocks if wanted and any(p.requires_grad for p in m.parameters())]
        for block in blocks:  # not by the block's own switch, which asks for training mode
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            block.forward = partial(again, block.forward)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in name order: the layout of every update."""
        return self._trainable

    @cached_property
    def _trainable(self) -> dict[str, nn.Parameter]:  # asked for many times a round
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if self.head is not None:
            named |= {f"head.{n}": p for n, p in self.head.named_parameters()}
        return dict(sorted(named.items()))

    def trainable(self) -> Arrays:
        return {n: p.detach().float().cpu().numpy().copy() for n, p in self.parameters().items()}

    def zero(self) -> Arrays:
        """The trainable arrays of the untouched base: a head's public start is zero too."""
        return {n: np.zeros(tuple(p.shape), np.float32) for n, p in self.parameters().items()}

    def load_trainable(self, arrays: Arrays) -> None:
        """Errors: ModelError when names or shapes differ from this network's, or an entry is not
        finite, or larger than LARGEST."""
        load_into(self.parameters(), arrays)

    def draw_factor(self, seed: int) -> Arrays:
        """LoRA's A from a public seed, the same on every machine; loaded and returned."""
        drawn = lora_module.draw(self._factor, seed)
        self.load_frozen(drawn)
        return drawn

    def adopt(self, study: Study, received: Arrays) -> Arrays:
        """Load LoRA's A for `study` and return it: drawn from the public seed, or `received` where
        it was built from public text. Errors: ModelError when it is not the plan's."""
        if study.lora is None:
            return {}
        drawn = study.lora.a_init == "seed"
        factor = self.draw_factor(study.study.seed) if drawn else received
        digest = lora_module.digest(factor)
        if study.lora.a_digest not in (None, digest):
            raise ModelError("the adapter's frozen factor is not the plan's", "lora.a_digest")
        factor = self._adopted.setdefault(digest, factor)
        self.load_frozen(factor)
        return factor

    def initial(self, factor: Arrays) -> Arrays:
        """The trainable arrays of round 0: B and head zero, so nothing of the base changes yet;
        A as in `factor` where it is trained too."""
        return {
            n: factor[n] if n in factor else np.zeros(tuple(p.shape), dtype=np.float32)
            for n, p in self.parameters().items()
        }

    def frozen_factor(self) -> Arrays:
        """LoRA's A by name; empty for a head alone."""
        return {n: p.detach().float().cpu().numpy().copy() for n, p in self._factor.items()}

    def load_frozen(self, arrays: Arrays) -> None:
        """Free where the same arrays were loaded last and nothing wrote to A since.
        Errors: as `load_trainable`."""
        if self._loaded is None or self._loaded[0] is not arrays or self._loaded[1] != self._now():
            load_into(self._factor, arrays)
            self._loaded = arrays, self._now()

    @contextmanager
    def loaded(
        self, frozen: Arrays | None = None, trainable: Arrays | None = None
    ) -> Iterator[None]:
        """Load arrays, and load what was there again afterwards; None: they stay as they are.
        Errors: as `load_trainable`."""
        before = self.frozen_factor() if frozen is not None else None, self.trainable()
        try:
            if frozen is not None:
                self.load_frozen(frozen)
            if trainable is not None:
                self.load_trainable(trainable)
            yield
        finally:
            if before[0] is not None:
                self.load_frozen(before[0])
            self.load_trainable(before[1])

    def _now(self) -> list[int]:
        """A's versions: PyTorch counts what is written to a tensor."""
        return [parameter._version for parameter in self._factor.values()]

    @cached_property
    def _factor(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if "lora_A" in n}

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """The untouched base: adapters off."""
        if isinstance(self.model, PeftModel):
            adapter = [*self._trainable.values(), *self._factor.values()]
            trains = [p.requires_grad for p in adapter]
            try:
                with self.model.disable_adapter():
                    yield
            finally:  # PEFT switches an adapter on again with all of it trainable, A too
                for parameter, wanted in zip(adapter, trains, strict=True):
                    parameter.requires_grad_(wanted)
        else:
            yield

    def save(self, folder: Path) -> None:
        """PEFT's own format; a head (if any) beside it as head.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template
        if self.head is not None:
            body = {n: p.detach().contiguous() for n, p in self.head.named_parameters()}
            save_file(body, folder / HEAD, {"base": json.dumps(self.base.name)})
