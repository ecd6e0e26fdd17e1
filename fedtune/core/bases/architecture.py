"""Locate text model, head, tower and projector in each supported architecture, by the names of its
modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fedtune.core.bases.digest import settings_in
from fedtune.core.config.known_bases import Kind

PROJECTOR = "projector"  # in lora.modules: the linear layers between tower and language model
WIDTH = 8  # numbers: a block may hold several records if each layer's width is a multiple of this
SIDE = 448  # pixels: the longest side of an image for a base that takes images of any size


@dataclass(frozen=True)
class Components:
    """The parts of a loaded model. A base of images or audio has a tower, which encodes a file as
    states, and perhaps a projector, which maps these states to vectors of the text model's width.

    - text: the text model, from embeddings to `.last_hidden_state`; LoRA layers go here
    - lm_head: maps the text model's states to scores of the next token; None for an encoder
    - tower: a function from a file's tensors (n, …) to states (n, P, W); it is frozen; None if the
      base reads text alone
    - projector: maps the tower's states to (n, P', H), with H the text model's width; None if there
      is no tower, or if the text attends to the tower's states themselves
    - place: the id of the token whose embedding a projected state replaces; -1 if there is none
    - crossed: whether the text attends to the tower's states themselves
    - frames: an upper bound on P, the number of states of a file
    - projected: P', the number of vectors of a file; 1 if it follows from the file's size, and 0
      without a projector
    - plane: whether text positions carry an image's height and width (M-RoPE)"""

    text: nn.Module
    lm_head: nn.Module | None = None
    tower: Callable[[torch.Tensor], torch.Tensor] | None = None
    projector: nn.Module | None = None
    place: int = -1
    crossed: bool = False
    frames: int = 0
    projected: int = 0
    plane: bool = False


def parts_of(model: Any, kind: Kind) -> Components:
    """Find the text model, LM head, tower and projector in a model that transformers loaded. kind:
    the base's kind, by which the modules are named."""
    if kind == "encoder":
        return Components(model)
    if kind == "causal":
        return Components(model.model, model.lm_head)
    inner = model.model
    if kind == "speech":

        def encode_audio(mel: torch.Tensor) -> torch.Tensor:
            states: torch.Tensor = inner.encoder(mel).last_hidden_state
            return states

        frames = int(model.config.max_source_positions)
        return Components(inner.decoder, model.proj_out, encode_audio, crossed=True, frames=frames)
    place, vision = int(model.config.image_token_id), model.config.vision_config
    if hasattr(inner, "visual"):
        merger, unmerged = inner.visual.merger, with_parts(inner.visual, merger=nn.Identity())

        def encode_patches(patches: torch.Tensor) -> torch.Tensor:
            grid = _grid(patches).to(patches.device)
            states: torch.Tensor = unmerged(patches.flatten(0, 1), grid_thw=grid).last_hidden_state
            return states.view(*patches.shape[:2], -1)

        frames = (SIDE // int(vision.patch_size)) ** 2
        return Components(
            text=inner.language_model,
            lm_head=model.lm_head,
            tower=encode_patches,
            projector=_Merger(merger),
            place=place,
            frames=frames,
            projected=1,
            plane=True,
        )
    frames = (int(vision.image_size) // int(vision.patch_size)) ** 2
    if hasattr(inner, "connector"):
        patch = int(vision.patch_size)

        def encode_pixels(pixels: torch.Tensor) -> torch.Tensor:
            mask = pixels[:, 3].unfold(1, patch, patch).unfold(2, patch, patch)
            states: torch.Tensor = inner.vision_model(
                pixel_values=pixels[:, :3], patch_attention_mask=(mask > 0).any(-1).any(-1)
            ).last_hidden_state
            return states

        return Components(
            text=inner.text_model,
            lm_head=model.lm_head,
            tower=encode_pixels,
            projector=inner.connector,
            place=place,
            frames=frames,
            projected=frames // int(inner.connector.scale_factor) ** 2,
        )

    def feature_layers(pixels: torch.Tensor) -> torch.Tensor:
        layers = model.config.vision_feature_layer
        hidden = inner.vision_tower(pixels[:, :3], output_hidden_states=True).hidden_states
        chosen = [hidden[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        first = int(model.config.vision_feature_select_strategy == "default")
        return torch.cat([states[:, first:] for states in chosen], dim=-1)

    if model.config.vision_feature_select_strategy != "default":
        frames += 1  # the state of the class token, if the tower has one
    return Components(
        text=inner.language_model,
        lm_head=model.lm_head,
        tower=feature_layers,
        projector=inner.multi_modal_projector,
        place=place,
        frames=frames,
        projected=frames,
    )


class _Merger(nn.Module):
    """Qwen2-VL's projector, in a form that takes one image per row: it maps the tower's states (n,
    P, W) to (n, P/4, H), one vector for each four neighbouring patches."""

    def __init__(self, merger: Any) -> None:
        super().__init__()
        self.merger = merger

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        merger: Any = self.merger
        neighbours = merger.ln_q(states).reshape(len(states), -1, merger.hidden_size)
        return merger.mlp(neighbours)  # type: ignore[no-any-return]


def _grid(patches: torch.Tensor) -> torch.Tensor:
    """Compute (time, height, width) in patches, (n, 3), of square images given as (n, P, …)."""
    side = math.isqrt(patches.shape[1])
    return torch.tensor([[1, side, side]] * len(patches))


def plane_positions(holes: torch.Tensor) -> torch.Tensor:
    """Compute the positions that Qwen2-VL gives to each token, (3, B, L): in time, height and
    width. Text after an image continues from the image's longest side.

    holes: (B, L), True for the tokens that stand for an image; those of a row must follow each
    other, and the image be square.
    Reference: Wang et al. 2024, section 2.1 (M-RoPE)."""
    number = holes.sum(dim=1, keepdim=True)
    side = number.sqrt().round().long().clamp_min(1)
    nth = holes.cumsum(dim=1) - 1
    index = torch.arange(holes.shape[1], device=holes.device).expand_as(nth)
    after = ~holes & (nth == number - 1) & (number > 0)
    time = torch.where(holes, index - nth, torch.where(after, index - number + side, index))
    within = torch.where(holes, nth, 0)
    return torch.stack([time, time + within // side, time + within % side])


def inputs(
    model: Any, kind: Kind, tensor: torch.Tensor, ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the tensor of one file in the form in which the transformers model takes it: a dict of
    arguments by name. The tokens are not among them.

    - model: the base as transformers loaded it; its configuration says which arguments it takes
    - kind: the base's kind: "speech" takes a sound, all others pictures
    - tensor: what the base's reader computed from the file (`Reader.tensor`). For a sound this is a
      log-mel spectrogram (1, mel bins, frames); for pictures, colours and mask (tiles, 4, height,
      width); for pictures of Qwen2-VL, patches (tiles, P, …)
    - ids: the tokens of the record's text, (1, L), with the special tokens that stand for the file;
      only Qwen2-VL needs them"""
    if kind == "speech":
        return {"input_features": tensor}
    if hasattr(model.config, "vision_start_token_id"):
        return {
            "pixel_values": tensor.flatten(0, 1),
            "image_grid_thw": _grid(tensor),
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        }
    if hasattr(model.config, "scale_factor"):
        return {"pixel_values": tensor[None, :, :3], "pixel_attention_mask": tensor[None, :, 3] > 0}
    return {"pixel_values": tensor[:, :3]}


def fill(states: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Put the vectors of files in the places that were kept for them: in each row of `states` (R,
    L, H), replace the NaN positions, in order, by the K vectors in the same row of `features` (R,
    K, H), and return the result.

    Guarantee: a row's result depends on that row alone. Errors: RuntimeError if a row does not have
    K such positions."""
    holes = states[..., 0].isnan()
    if bool((holes.sum(dim=1) != features.shape[1]).any()):
        raise RuntimeError(
            "a record has a different number of place-holders than its image has tokens"
        )
    order = (holes.cumsum(dim=1) - 1).clamp_min(0)
    ordered = features.gather(1, order[:, :, None].expand(-1, -1, features.shape[2]))
    return torch.where(holes[:, :, None], ordered.to(states.dtype), states)


def with_parts(model: nn.Module, /, **modules: nn.Module) -> nn.Module:
    """Copy `model` shallowly, with the children named in `modules` replaced by the modules given
    there. The other children are shared with `model`, not copied."""
    twin = copy.copy(model)
    object.__setattr__(twin, "_modules", {**model._modules, **modules})
    return twin


POSITIONS = ("max_position_embeddings", "max_target_positions", "n_positions")  # in a config

# Architectures (model_type) with which several records may share a block. With each of them it was
# tried, at random weights, that no record of a block changed by a bit, whatever the tokens of
# another record. With any other architecture each block is one record
# (docs/decisions/0091-what-the-digest-covers.md).
_TEXTS = """
albert apertus arcee bert camembert cohere cohere2 data2vec-text deberta deberta-v2 distilbert
electra ernie ernie4_5 eurobert exaone4 gemma gemma2 gemma3_text glm glm4 granite helium
hunyuan_v1_dense llama megatron-bert ministral ministral3 mistral modernbert mpnet nemotron
nomic_bert olmo olmo2 olmo3 phi phi3 qwen2 qwen3 rembert roberta roberta-prelayernorm seed_oss
smollm3 stablelm starcoder2 xlm-roberta xlm-roberta-xl
"""
_WITH_TOWERS = """
clip_vision_model idefics3 idefics3_vision llava qwen2_vl qwen2_vl_text qwen2_vl_vision
siglip_vision_model smolvlm smolvlm_vision whisper
"""
SHARING = frozenset((_TEXTS + _WITH_TOWERS).split())


def may_share_blocks(config: Any) -> bool:
    """Return whether a base may compute several records in one block (one pass of the model). It
    may if its architecture, and that of each part of its configuration, is in SHARING: for these it
    is known that no record of a block changes another's result."""
    return {kind for _, kind in settings_in(config.to_dict(), "model_type")} <= SHARING


def has_whole_widths(backbone: nn.Module) -> bool:
    """Return whether the widths of a base's layers are multiples of WIDTH. If not, a row's result
    may depend on its place in a block (`models.cache`). The layer that gives a score to each token
    of the vocabulary does not count."""
    from transformers.pytorch_utils import Conv1D

    scores = getattr(backbone, "get_output_embeddings", lambda: None)()
    widths = [
        module.nf if isinstance(module, Conv1D) else module.out_features
        for module in backbone.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not scores
    ]
    return all(width % WIDTH == 0 for width in widths)


def rows_of(config: Any, *tables: Any) -> int:
    """Return how many token ids, counted from 0, have a row in every table of a base. This is the
    smallest of these numbers: the rows of each of `tables` (modules with a weight, such as
    embeddings), and each size that the language model's configuration states (vocab_size,
    vocab_size_…). config: the base's configuration, which contains the language model's."""
    stated = config.get_text_config().to_dict().items()
    sizes = [n for key, n in stated if key.startswith("vocab_size") and isinstance(n, int)]
    return min(*sizes, *(len(table.weight) for table in tables))


def pool_states(hidden: torch.Tensor, mask: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Pool hidden states to one vector per record, (B, H) fp32: the last token's state or, for an
    encoder, the mean over tokens, scaled to the Euclidean norm √H.

    - hidden: the hidden states, (B, L, H)
    - mask: (B, L), 1 for a token and 0 for padding, which is at the end
    - kind: the base's kind"""
    if kind != "encoder":
        last = mask.sum(dim=1) - 1
        return hidden[torch.arange(len(hidden), device=last.device), last].float()
    weights = mask.float()[:, :, None]
    mean = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)
    # Length √H: what a layer norm gives, so that one learning rate serves every base.
    return nn.functional.normalize(mean, dim=1) * math.sqrt(hidden.shape[2])


def pool_frames(states: torch.Tensor, width: int) -> torch.Tensor:
    """Project each clip's states to one vector, and return the vectors, (B, width) fp32, each
    scaled to the Euclidean norm √width. Each number of a clip gets a random sign and is added to a
    random entry of the clip's vector.

    - states: (B, …), one row for each clip, with all patches of all frames in order
    - width: the number of entries of a vector

    The draws are public and the same for every clip, and distances are kept on average. So the
    vector still tells two orders of the same frames apart; a mean over frames would not.
    Reference: Charikar et al. 2002, "Finding frequent items in data streams" (CountSketch);
    Weinberger et al. 2009, "Feature hashing for large scale multitask learning", section 2."""
    flat = states.flatten(1).float()
    order, signs = _drawn(flat.shape[1], width)
    spread = torch.where(order < flat.shape[1], order, 0)
    kept = flat[:, spread.to(flat.device)] * signs.to(flat.device)
    sums = kept.view(len(kept), -1, width).sum(dim=1)
    return nn.functional.normalize(sums, dim=1) * math.sqrt(width)


@lru_cache(maxsize=2)
def _drawn(count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw, from a fixed seed, the order and the signs with which `pool_frames` adds up a clip's
    numbers. Return two tensors of length n, which is `count` rounded up to a multiple of `width`: 0
    … n - 1 in random order, and for each entry of this order a random sign (±1), or 0 if the entry
    is `count` or more and so stands for no number.

    - count: how many numbers a clip has
    - width: the number of entries of a clip's vector"""
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(count + -count % width, generator=draw)
    signs = 2.0 * torch.randint(2, order.shape, generator=draw) - 1
    return order, signs * (order < count)


def positions_of(model: Any) -> int | None:
    """Count the positions that a text model supports; None if its config does not say."""
    sizes = (getattr(model.config, name, None) for name in POSITIONS)
    positions = [size for size in sizes if isinstance(size, int) and size > 0]
    if not positions:
        return None
    # RoBERTa counts positions from padding_idx + 1.
    padding = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    return min(positions) - (0 if padding is None else padding + 1)
