"""Hold one copy of the base in memory, cut into a frozen prefix and a trainable part. Sites and
coordinator use the same methods, whatever the base: `prefix` (states at the cut), `hidden` (hidden
states above it) and `logits`. Adapters are swapped by loading arrays.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from fedtune.core import modalities
from fedtune.core.bases.architecture import (
    PROJECTOR,
    fill,
    has_whole_widths,
    may_share_blocks,
    parts_of,
    plane_positions,
    pool_frames,
    pool_states,
    positions_of,
    rows_of,
)
from fedtune.core.bases.find import Base, load_backbone, load_tokenizer
from fedtune.core.bases.quantise import quantise
from fedtune.core.config import LoraTable, QuantisationTable, Study
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.models import lora as lora_module
from fedtune.core.models import preconditioner
from fedtune.core.models.class_statistics import ClassStatistics
from fedtune.core.models.lora import Arrays, load_into
from fedtune.core.models.loss import head_loss
from fedtune.core.models.module_state import build_refusal, describe_state
from fedtune.core.models.places import rows_keep_digits
from fedtune.core.models.prefix_store import HiddenStates
from fedtune.core.models.split import Split, cut
from fedtune.core.registry.arrays import CLASS_SUMS
from fedtune.core.run_folder import HEAD

log = logging.getLogger("fedtune.models")

# Positions of a block: enough for a quick matrix product, with little padding. Passes through the
# frozen part may pad more, since they run once over all records.
BLOCK_POSITIONS = {"cpu": 256, "cuda": 1024}
PREFIX_POSITIONS = {"cpu": 256, "cuda": 4096}


class Network:
    """A frozen base with its adapter or head.

    Shapes: B records, L positions, H hidden, V classes or vocabulary. A file has P states of length
    W for each of its tiles. Adapters and heads are in fp32, whatever the base's type."""

    def __init__(
        self,
        base: Base,
        dtype: torch.dtype,
        lora: LoraTable | None,
        labels: int,
        quantisation: QuantisationTable | None = None,
        modality: str | None = None,
        directions: int = 0,
    ) -> None:
        """Build the network. B and head are zero, and A is drawn from seed 0, until arrays are
        loaded.

        - base: the verified base, which is loaded from its folder
        - dtype: the number format of the base's states and, unless it is quantised, its weights
        - lora: the plan's [lora] table; None if only a head is trained
        - labels: number of outputs of the trained head; 0 to use the model's own head
        - quantisation: how the base's weights are stored; None: in `dtype`
        - modality: the study's base.modality; None: the modality of this release that reads records
          for a base of this kind
        - directions: number of directions of the public basis, if class statistics are trained for
          the head; else 0

        Errors: ConfigError if there is nothing to train, or class statistics with an adapter; those
        of loading a base."""
        if not lora and not labels:
            raise ConfigError("nothing to train", "a [lora] table, or objective classify or reward")
        self.base = base
        self.dtype = dtype
        self.kind = base.kind
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(base)
        self.reader = modalities.reader(base, self.tokenizer, modality)
        backbone = load_backbone(base, dtype)
        # The CPU unless there is a GPU; CUDA_VISIBLE_DEVICES selects one.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: PreTrainedModel | PeftModel = nn.Module.to(backbone, self.device)
        if quantisation:
            quantise(backbone, quantisation, dtype)
        self._parts = parts_of(backbone, base.kind)
        # Whether no record of a block changes another's result, as far as the architecture goes.
        self.keeps_apart = may_share_blocks(backbone.config) and has_whole_widths(backbone)
        # Whether several threads may compute with the network at once. An int8 layer has one table
        # of outliers, and an architecture that was not tried might keep something for its next
        # layer.
        int8 = quantisation is not None and quantisation.method == "int8"
        self.side_by_side = self.keeps_apart and not int8
        self._backbone, self._lm_head = self._parts.text, self._parts.lm_head
        text = backbone.config.get_text_config()
        self.hidden_size, self.vocabulary = int(text.hidden_size), int(text.vocab_size)
        self.head = nn.Linear(self.hidden_size, labels, device=self.device) if labels else None
        if self.head is not None:
            nn.init.zeros_(self.head.weight)  # public, and the same at every site
            nn.init.zeros_(self.head.bias)
        self.statistics: ClassStatistics | None = None
        if directions:
            if lora:
                raise ConfigError(
                    "class statistics are computed with the base as it is", "no [lora] table"
                )
            self.statistics = ClassStatistics(self.hidden_size, directions, labels, self.device)
        self._split: Split | None = None
        self._projects = lora is not None and PROJECTOR in lora.modules
        if lora:
            if base.kind != "encoder" and not self._projects:
                self._split = self._cut(lora)
            if self._parts.plane and not self.positionwise:
                self._split = None  # above it, the image's positions would be unknown
            self.model = lora_module.attach(backbone, lora, base.name, self._parts)
        self.pooled = not lora  # a head alone: training needs one vector per record
        # Whether `hidden` fills in the image: its projector is trained, or no text layer is cut.
        self._fills = self._projects or (self._parts.plane and not (self.pooled or self._split))
        # States at the cut, and a tower's states of a file, by a digest of their input; shared by
        # all datasets with the same record; freed with their last holder.
        self.states: WeakValueDictionary[bytes, HiddenStates] = WeakValueDictionary()
        self._adopted: dict[str, Arrays] = {}  # A by digest, shared by all who train over it
        self._loaded: tuple[Arrays, list[int]] | None = None  # A, and its tensors' versions
        self.preconditioner: Arrays = {}  # W by name, loaded with A
        self.draw_factor(seed=0)

    def _cut(self, lora: LoraTable) -> Split | None:
        """Find the layer at which the base is cut, by trying it on a text. Return the two parts;
        None if there is no cut. This is the first text that the base reads. Its modules may then
        add state that they build at their first use, but may change no state that they had. Errors:
        KeepsState if they do."""
        before = describe_state(self._backbone)
        found = cut(self._backbone, lora)
        if not before.items() <= describe_state(self._backbone).items():
            raise build_refusal(f"the base {self.base.digest}", "the first text changed its state")
        return found

    @cached_property
    def shares_blocks(self) -> bool:
        """Whether several records may be computed in one block, so that no record changes another's
        result. This must hold for the architecture, and for this machine: here a row's digits must
        not depend on its place in a block, which is tried when this property is first read."""
        if not self.keeps_apart:
            return False
        most = max(BLOCK_POSITIONS[self.device.type], PREFIX_POSITIONS[self.device.type])
        if rows_keep_digits(self.modules, most, self.device):
            return True
        log.warning(
            "on this machine a row's last digits depend on its place in a matrix, so each record "
            "is computed by itself; this takes longer"
        )
        return False

    @cached_property
    def rows(self) -> int:
        """How many different tokens the base's tables (the embedding and the head) can read: token
        ids below this number have a row in each."""
        tables = filter(None, (self.model.get_input_embeddings(), self._lm_head))
        return rows_of(self.model.config, *tables)

    @cached_property
    def positions(self) -> int | None:
        """The length in tokens of the longest text that the base can read; None if its config does
        not say."""
        return positions_of(self._backbone)

    def check_length(self, length: int) -> None:
        """Check that the base has positions for texts of `length` tokens. Errors: ConfigError."""
        if self.positions is not None and length > self.positions:
            raise ConfigError(
                f"objective.max_length = {length} is more than the base can read",
                f"at most {self.positions} tokens",
            )

    @property
    def modules(self) -> nn.ModuleDict:
        """Every module that computes on records, frozen and trained."""
        found = {"model": self.model, "head": self.head, "statistics": self.statistics}
        found |= {"text": self._backbone, "projector": self._parts.projector}
        if self._split:
            found |= {"prefix": self._split.prefix, "tail": self._split.tail}
        return nn.ModuleDict({name: part for name, part in found.items() if part is not None})

    @property
    def cached(self) -> bool:
        """Whether states at the cut are cached. They are if something below the cut is frozen, so
        that it computes the same in every step."""
        return self.pooled or self._split is not None

    @property
    def positionwise(self) -> bool:
        """Whether the layers above the cut treat each position by itself: none of them mixes
        positions."""
        return self._split is not None and self._split.positionwise

    @property
    def reads_tower(self) -> bool:
        """Whether the layers above the cut read the states of the tower (the base's frozen encoder
        of images or audio)."""
        if self.pooled or self.positionwise:
            return False
        return self._fills or self._parts.crossed

    def frames(self, tiles: int) -> int:
        """Return how many states the tower (the base's frozen encoder of images or audio) gives for
        a file of `tiles` tiles; 0 without a tower."""
        return self._parts.frames * tiles

    def projected(self, tiles: int) -> int:
        """Return how many vectors the projector makes of a file of `tiles` tiles; 0 without a
        projector."""
        return self._parts.projected * tiles

    def has_row_per_tile(self, parameter: nn.Parameter) -> bool:
        """Return whether this parameter belongs to a trained projector. In the projector's layers a
        row of the input is a tile of a file; in all others it is a passage."""
        if not self._projects or self._parts.projector is None:
            return False
        return any(parameter is p for p in self._parts.projector.parameters())

    @property
    def trained(self) -> nn.Module:
        """The module that holds every trainable parameter, which the gradient engine watches."""
        holder = nn.ModuleDict()
        if not self.pooled:
            holder["backbone"] = self._split.tail if self._split else self._backbone
        if self._projects and self._parts.projector is not None:
            holder["projector"] = self._parts.projector
        if self.statistics is not None:
            holder["statistics"] = self.statistics
        elif self.head is not None:
            holder["head"] = self.head
        return holder

    @cached_property
    def products(self) -> tuple[int, int]:
        """How many multiplications a pass takes, as a pair: for one position in the layers above
        the cut, and for one target in the base's own head (0 if that head is not used). The time of
        a pass follows from both."""
        above = 0 if self.pooled else _weights(self._split.tail if self._split else self._backbone)
        scored = self.head is None and self._lm_head is not None
        return above, self.hidden_size * self.vocabulary if scored else 0

    @torch.no_grad()
    def encode_media(self, tensor: torch.Tensor) -> torch.Tensor:
        """Run the tower (the frozen encoder of images or audio) on one file's tensor. Return its
        states, (tiles, P, W): P states of length W for each tile."""
        assert self._parts.tower is not None
        return self._parts.tower(tensor.to(self.device, self.dtype))

    @torch.no_grad()
    def prefix(
        self, input_ids: torch.Tensor, mask: torch.Tensor, tower_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the states at the cut, (B, L, H). Without a cut these are the tokens' embeddings;
        if only a head is trained, the pooled vectors (B, 1, H) fp32. Place-holders that `hidden`
        fills with the projector's output are NaN until then.

        - input_ids: token ids, (B, L) int64
        - mask: (B, L) bool, False on padding, which is on the right
        - tower_states: the tower's states of each passage's file, (B, tiles, P, W), as
          `encode_media` gives them; None for a base that reads text alone"""
        input_ids, mask = input_ids.to(self.device), mask.to(self.device)
        if self.pooled and self._parts.crossed:
            assert tower_states is not None  # a head on the tower itself: the mean over all frames
            frames = tower_states[:, 0]
            return pool_states(frames, torch.ones_like(frames[..., 0]), "encoder")[:, None]
        if self.pooled and self.reader.column == "video":
            assert tower_states is not None
            return pool_frames(tower_states, self.hidden_size)[:, None]
        if not (self.pooled or self._split):
            return self._embed(input_ids, tower_states)
        inputs = {"input_ids": input_ids}
        if self._parts.projector is not None:
            inputs = {"inputs_embeds": self._embed(input_ids, tower_states)}
            inputs |= self._position_ids(input_ids == self._parts.place)
        inputs |= self._cross_inputs(tower_states)
        if self._split:
            return self._run(self._split.prefix, mask, **inputs)
        return pool_states(self._run(self._backbone, mask, **inputs), mask, self.kind)[:, None]

    def _embed(self, input_ids: torch.Tensor, tower_states: torch.Tensor | None) -> torch.Tensor:
        embed: nn.Module = self.model.get_input_embeddings()
        states: torch.Tensor = embed(input_ids)
        if self._parts.projector is None:
            return states
        states = states.masked_fill((input_ids == self._parts.place)[:, :, None], torch.nan)
        return states if self._fills else self._fill(states, tower_states)

    def _position_ids(self, is_placeholder: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the argument `position_ids` for a base whose positions are two-dimensional
        (M-RoPE); {} for others. is_placeholder: (B, L), True where a token stands for a part of the
        image."""
        return {"position_ids": plane_positions(is_placeholder)} if self._parts.plane else {}

    def _fill(self, states: torch.Tensor, tower_states: torch.Tensor | None) -> torch.Tensor:
        """Return `states` with the vectors at each passage's place-holders, which are NaN, replaced
        by the projector's output for its file's tiles. states: (B, L, H); tower_states: the tower's
        output for the files, (B, tiles, P, W), not None here."""
        assert tower_states is not None and self._parts.projector is not None
        features = self._parts.projector(tower_states.flatten(0, 1))  # (B · tiles, P', H)
        return fill(states, features.reshape(len(tower_states), -1, features.shape[-1]))

    def _cross_inputs(self, tower_states: torch.Tensor | None) -> dict[str, torch.Tensor]:
        if not self._parts.crossed:
            return {}
        assert tower_states is not None
        return {"encoder_hidden_states": tower_states[:, 0]}

    @property
    def has_head(self) -> bool:
        """Whether a classification head is trained, in place of the model's own."""
        return self.head is not None

    def hidden(
        self,
        prefix: torch.Tensor,
        mask: torch.Tensor,
        keep: torch.Tensor | None = None,
        tower_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute last hidden states from the states at the cut, with adapters applied, (B, L, H).
        If `keep` (B, K) is given, compute them only at these positions, (B, K, H).

        - prefix: the states at the cut, (B, L, H), as the method `prefix` or a cache gives them; if
          only a head is trained, they are returned unchanged
        - mask: (B, L) bool, False on padding
        - keep: the indices of K positions of each passage, (B, K); None: all positions
        - tower_states: the tower's states of each passage's file, (B, tiles, P, W); needed if
          `reads_tower`"""
        if self.pooled:
            return prefix
        extra = self._cross_inputs(tower_states) if self.reads_tower else {}
        if self._fills:
            extra |= self._position_ids(prefix[..., 0].isnan())
            prefix = self._fill(prefix, tower_states)
        tail = self._split.tail if self._split else self._backbone
        if keep is None:
            return self._run(tail, mask, inputs_embeds=prefix, **extra)
        if self._split and self._split.narrows:
            return self._run(tail, mask, inputs_embeds=prefix, keep=keep, **extra)
        states = self._run(tail, mask, inputs_embeds=prefix, **extra)
        return states.gather(1, keep[:, :, None].expand(-1, -1, states.shape[2]))

    def logits(self, selected: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits from n states (n, H): (n, V) fp32. If a head is trained, they are the
        classes' logits; if not, the next token's. tokens: the only tokens whose next-token logits
        are computed, one column for each; None: all tokens."""
        if self.head is not None:
            scores: torch.Tensor = self.head(selected.float())
            return scores
        assert self._lm_head is not None
        weight: torch.Tensor = self._lm_head.weight  # type: ignore[assignment]
        if tokens is not None:
            selected, weight = selected.float(), weight[tokens].float()
        logits: torch.Tensor = (selected @ weight.T).float()
        return logits

    def token_losses(self, selected: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute the negative log-likelihood (nats) of the next tokens `targets` (n,) from n
        states (n, H): (n,) fp32."""
        assert self._lm_head is not None
        return head_loss(selected, self._lm_head.weight, targets)  # type: ignore[arg-type]

    def class_sums(self, vectors: torch.Tensor, count_weight: float) -> torch.Tensor:
        """Return the products of each record's class statistics (the features of its vector, then
        `count_weight`) with the trained sums of each class, (B, V) fp32.

        - vectors: the base's vectors of B records, (B, H)
        - count_weight: what a record adds to its class's count

        Errors: ModelError if the network trains no class sums."""
        if self.statistics is None:
            raise ModelError(
                "this network trains no class sums", "an objective that does, such as prototypes"
            )
        products: torch.Tensor = self.statistics(vectors, count_weight)
        return products

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool hidden states to one vector per record, (B, H) fp32: the mean over tokens on an
        encoder, else the last token's state. If only a head is trained, `prefix` has pooled
        already, and that vector is returned; for a recording it is the mean over its frames, for a
        clip a projection of all its frames in order.

        - hidden: the hidden states, (B, L, H)
        - mask: (B, L) bool, False on padding"""
        return hidden[:, 0] if self.pooled else pool_states(hidden, mask, self.kind)

    def _run(self, part: nn.Module, mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        # Records are padded on the right, so in a causal base no token can see padding: leaving
        # the mask out lets attention take its fast path and changes no real position.
        causal = self.kind != "encoder"
        extra = {"use_cache": False} if causal else {"attention_mask": mask.long()}
        states: torch.Tensor = part(**inputs, **extra).last_hidden_state
        return states

    @contextmanager
    def recomputing(self, enabled: bool) -> Iterator[None]:
        """A context manager: if `enabled`, checkpoint activations within the block. Layers with an
        adapter then keep only their inputs in memory, and run again in the backward pass. Gradients
        are the same, and take a third more time."""
        blocks = [m for m in self.trained.modules() if isinstance(m, GradientCheckpointingLayer)]
        blocks = [m for m in blocks if enabled and any(p.requires_grad for p in m.parameters())]
        for block in blocks:  # the block's own switch would need training mode
            recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            block.forward = partial(recompute, block.forward)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name, in the order of their names. Every update has
        its arrays in this order."""
        return self._trainable

    @cached_property
    def _trainable(self) -> dict[str, nn.Parameter]:  # read many times a round
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if self.head is not None:
            named |= {f"head.{n}": p for n, p in self.head.named_parameters()}
        return dict(sorted(named.items()))

    def update_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters whose change a site sends, by name, in the order of their names:
        the trainable ones or, in a study of class statistics, the sums from which the coordinator
        computes the head."""
        if self.statistics is None:
            return self.parameters()
        return {CLASS_SUMS: cast(nn.Parameter, self.statistics.sums.weight)}

    def trainable(self) -> Arrays:
        return {n: p.detach().float().cpu().numpy().copy() for n, p in self.parameters().items()}

    def zero(self) -> Arrays:
        """Return an array of zeros for each trainable parameter, by name. With these arrays the
        network computes what the base alone does, since an untrained head is zero, too."""
        return {n: np.zeros(tuple(p.shape), np.float32) for n, p in self.parameters().items()}

    def load_trainable(self, arrays: Arrays) -> None:
        """Load the trainable arrays, and set the sums of class statistics to zero if there are any.
        arrays: the arrays by name, as `trainable` returns them. Errors: ModelError if names or
        shapes differ from this network's, or an entry is not finite or larger than LARGEST."""
        load_into(self.parameters(), arrays)
        if self.statistics is not None:
            self.statistics.reset()

    def draw_factor(self, seed: int) -> Arrays:
        """Draw LoRA's A from a public seed or, in a study of class statistics, their basis. Load
        the drawn arrays into the network, and return them by name. They are equal on every
        machine."""
        if self.statistics is not None:
            self.statistics.draw(seed)
            return self.statistics.arrays()
        drawn = lora_module.draw(self._factor, seed)
        self.load_frozen(drawn)
        return drawn

    def adopt(self, study: Study, received: Arrays) -> Arrays:
        """Load the arrays that `study` never trains into the network, and return them by name. For
        an adapter these are A, drawn from the public seed or as received, and the preconditioner's
        factors if the plan has one; in a study of class statistics, their basis; else none.

        - study: the plan
        - received: the frozen arrays that came with the plan, by name

        Errors: ModelError if they are not the plan's."""
        if self.statistics is not None:
            return self._adopt_basis(study, received)
        if study.lora is None:
            return {}
        factor, outputs = preconditioner.separate_frozen(received)
        if study.lora.a_init == "seed":
            factor = self.draw_factor(study.study.seed)
        outputs = lora_module.frozen_of_plan(study.lora, factor, outputs, self.parameters())
        whole = factor | outputs  # a new dict: the drawn one is known as loaded, without `outputs`
        whole = self._adopted.setdefault(lora_module.digest(whole), whole)
        self.load_frozen(whole)
        return whole

    def _adopt_basis(self, study: Study, received: Arrays) -> Arrays:
        """Load the basis of class statistics that came with the plan, and return it by name. If
        nothing was received and the plan has no digest of a basis, as for a finished run, draw the
        basis from the public seed. Errors: ModelError if it is not the plan's."""
        assert self.statistics is not None
        expected = study.objective.basis_digest
        if not received and expected is None:
            return self.draw_factor(study.study.seed)
        self.statistics.load(received)
        if expected not in (None, lora_module.digest(received)):
            raise ModelError(
                "the basis of class statistics is not the plan's",
                "the basis whose digest is objective.basis_digest",
            )
        return received

    def initial(self, factor: Arrays) -> Arrays:
        """Return the trainable arrays of an adapter that nothing has trained, by name: B and head
        zero, and A as in `factor` if A is trained. factor: A by name."""
        return {n: factor.get(n, array) for n, array in self.zero().items()}

    def frozen_factor(self) -> Arrays:
        """Return LoRA's A by name or, in a study of class statistics, their basis; {} if only a
        head is trained."""
        if self.statistics is not None:
            return self.statistics.arrays()
        return {n: p.detach().float().cpu().numpy().copy() for n, p in self._factor.items()}

    def load_frozen(self, arrays: Arrays) -> None:
        """Load the frozen arrays: LoRA's A, and the preconditioner's factors if `arrays` has any;
        or the basis of class statistics. If the same dict was loaded last, and A was not written
        since, A is not loaded again. Errors: ModelError if names or shapes differ from this
        network's, or an entry is not finite or too large."""
        if self.statistics is not None:
            return self.statistics.load(arrays)
        versions = self._factor_versions()
        if self._loaded is None or self._loaded[0] is not arrays or self._loaded[1] != versions:
            factor, self.preconditioner = preconditioner.separate_frozen(arrays)
            load_into(self._factor, factor)
            self._loaded = arrays, self._factor_versions()

    @contextmanager
    def loaded(
        self, frozen: Arrays | None = None, trainable: Arrays | None = None
    ) -> Iterator[None]:
        """A context manager: load arrays for the length of the block, and put the previous ones
        back after it. Class sums are then zero.

        - frozen: the frozen arrays, by name; None: those of the network stay
        - trainable: the trainable arrays, by name; None: the block begins with those of the
          network, which are put back after it all the same

        Errors: ModelError if names or shapes differ from the network's, or an entry is not finite
        or too large."""
        held = None if frozen is None else self.frozen_factor() | self.preconditioner
        trained = self.trainable()
        try:
            if frozen is not None:
                self.load_frozen(frozen)
            if trainable is not None:
                self.load_trainable(trainable)
            yield
        finally:
            if held is not None:
                self.load_frozen(held)
            self.load_trainable(trained)

    def _factor_versions(self) -> list[int]:
        """Return, for each tensor of A, how often it was written, by PyTorch's own count."""
        return [parameter._version for parameter in self._factor.values()]

    @cached_property
    def _factor(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if "lora_A" in n}

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """A context manager: disable adapters within the block, so that the network computes what
        the base alone does."""
        if isinstance(self.model, PeftModel):
            adapter = [*self._trainable.values(), *self._factor.values()]
            trainable_before = [p.requires_grad for p in adapter]
            try:
                with self.model.disable_adapter():
                    yield
            finally:  # PEFT enables an adapter with all of it trainable, A too
                for parameter, requires_grad in zip(adapter, trainable_before, strict=True):
                    parameter.requires_grad_(requires_grad)
        else:
            yield

    def save(self, folder: Path) -> None:
        """Save the adapter in PEFT's format in `folder`, and the head, if there is one, beside it
        as head.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template
        if self.head is not None:
            tensors = {n: p.detach().contiguous() for n, p in self.head.named_parameters()}
            save_file(tensors, folder / HEAD, {"base": json.dumps(self.base.name)})


def _weights(part: nn.Module) -> int:
    """Count the weights of the linear layers in a part of the network. They are counted from the
    layers' shapes, since a quantised layer packs its weights into fewer numbers."""
    layers = (module for module in part.modules() if isinstance(module, nn.Linear))
    return sum(layer.in_features * layer.out_features for layer in layers)
