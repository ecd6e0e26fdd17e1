"""Build a tiny base of a study's own architecture with random weights, for quick checks without
real records."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedtune.core.bases.find import Base, auto_class, find_base, load_config
from fedtune.core.config import LoraTable, Study
from fedtune.core.data.dataset import NO_TARGET, Dataset, Example, Passage
from fedtune.core.models.network import Network
from fedtune.core.models.preconditioner import factor_of, name_for, narrow_factors
from fedtune.core.models.random_records import GeneratedFile, generate_file, random_ids
from fedtune.core.models.random_targets import with_random_targets
from fedtune.core.models.rank_slice import ALL, rank_slice
from fedtune.core.models.tiny_media import shrink

HIDDEN = 32
INNER = 64
HEADS = 4
LAYERS = 4
VOCABULARY = 96
RANK = 4
_NAMES = ("<pad>", "<start>", "<end>", "<unknown>")
_SIZES = {  # of a tower
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}


def tiny_network(study: Study, base: Base) -> Network:
    """Build a tiny network of `base`'s architecture, fp32, with hidden states of 32 numbers, at
    most 4 layers, and the study's adapter. The adapter has rank 4 at most, and stands in as large a
    part of the layers as in the study, so that the base is cut in the same way.

    Weights come from the study's public seed. The trained ones are moved far from zero: a guarantee
    must hold at any weights, not only at the start, and a loss that couples records through the
    trained model's distance from the start (a batch's divergence) shows only there. Errors:
    whatever transformers raises if the architecture cannot be made this small."""
    with tempfile.TemporaryDirectory(prefix="fedtune-tiny-") as name:
        layers = _write(base, Path(name), study.study.seed)
        objective = study.objective.resolved
        lora = study.lora and _scale_lora(study.lora, *layers)
        small = find_base(name)
        stored, modality = study.base.quantisation, study.base.modality
        network = Network(
            *(small, torch.float32, lora, objective.outputs, stored, modality),
            directions=min(objective.directions, HIDDEN),
        )
    draw = np.random.default_rng(study.study.seed)
    if study.lora and (table := study.lora.preconditioner):
        made = {
            name_for(name): factor_of(_moment(draw, len(b)), table.rank, table.damping)
            for name, b in network.trainable().items()
            if ".lora_B." in name
        }
        network.load_frozen(
            network.frozen_factor() | (narrow_factors(made) if table.narrow else made)
        )
    network.load_trainable(
        {n: draw.normal(size=a.shape).astype(np.float32) for n, a in network.trainable().items()}
    )
    return network


def _moment(draw: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    """Generate a second moment, (size, size): the sum of outer products of random vectors that are
    far longer in some directions than in others. draw: the source of the numbers."""
    rows = draw.normal(size=(size, size)) * np.geomspace(10, 0.1, size)[:, None]
    return rows.T @ rows


def tiny_columns(study: Study, lora_rank: int | None) -> slice:
    """Return the columns of the tiny adapter's B that stand for those that a site trains.
    lora_rank: the site's rank; None, or the rank of the study's adapter: all columns. For a lower
    rank they are fewer than all, and do not begin with the first column."""
    if study.lora is None or lora_rank is None or lora_rank >= study.lora.rank:
        return ALL
    tiny = study.lora.model_copy(update={"rank": min(study.lora.rank, RANK)})
    return rank_slice(tiny, min(lora_rank, tiny.rank - 1), round_=2)


def generate_records(
    study: Study, network: Network, sizes: Sequence[int], stream: int = 0
) -> Dataset:
    """Generate `sizes[u]` records of 9 to 24 random tokens for unit u, so that records of different
    units share batches. If the base reads files, each record begins with a file of noise. The same
    study and stream give the same records.

    - study: the plan, whose public seed and objective are used
    - network: the tiny network that is to read them
    - sizes: the number of records of each unit
    - stream: the number of a series of records; another number gives others from the same seed"""
    draw = np.random.default_rng([study.study.seed, stream])
    record_format = study.objective.resolved.record_format
    labels = 2 if record_format == "unpaired_preference" else max(1, len(study.objective.labels))

    def passage(file: GeneratedFile) -> Passage:
        length = int(draw.integers(9, 25))
        ids = random_ids(network, draw, length + 1, len(_NAMES))
        targets = ids[1:].copy()
        targets[: int(draw.integers(0, length))] = NO_TARGET
        return file.prepend_to(ids[:-1].copy(), targets)

    examples = []
    for unit, size in enumerate(sizes):
        for _ in range(size):
            file = generate_file(network, study.objective, draw)
            better = passage(file)
            worse = passage(file) if record_format == "preference" else None
            label = int(draw.integers(labels))
            examples.append(Example(*better, label, unit, worse, file.media, file.tiles))
    return with_random_targets(Dataset(examples, len(sizes), Counter()), study, network.vocabulary)


def _write(base: Base, folder: Path, seed: int) -> tuple[int, int]:
    """Write the tiny base to `folder`. Return a pair: how many layers the real base has, and how
    many this one. seed: the seed of its weights."""
    auto, config = auto_class(base.kind), load_config(base)
    text = config.get_text_config(decoder=True)
    speech = base.kind == "speech"
    before = int(config.decoder_layers if speech else text.num_hidden_layers)
    if not speech:
        _shrink(text)
    names = (*_NAMES, *shrink(config, base, folder, _SIZES, len(_NAMES)))
    _save(config, auto, names, folder, seed)
    return before, int(config.decoder_layers if speech else text.num_hidden_layers)


def random_base(folder: Path, seed: int = 0) -> Path:
    """Write a random Llama with this module's tiny sizes to `folder`, for checks that need a base
    but none of a real one's files. Return `folder`."""
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=LAYERS, num_key_value_heads=HEADS)
    _shrink(config)
    _save(config, auto_class("causal"), _NAMES, folder, seed)
    return folder


def _save(config: Any, auto: Any, names: tuple[str, ...], folder: Path, seed: int) -> None:
    """Save a random model of `config`, and a tokenizer with the tokens `names`.

    - config: the transformers config of the tiny model; its vocabulary and the ids of its special
      tokens are set here
    - auto: the transformers class that makes a model of a config
    - names: the tokenizer's tokens by their ids; the first four stand for padding, start, end and
      an unknown token (_NAMES)
    - folder: where config, weights and tokenizer are written
    - seed: the seed of the weights"""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    text = config.get_text_config(decoder=True)
    for section in {id(c): c for c in (config, text)}.values():
        _renumber(section)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        made = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        made.save_pretrained(folder)
    numbers = {name: number for number, name in enumerate(names)}
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(
        tokenizer_object=Tokenizer(models.WordLevel(numbers, unk_token=_NAMES[3])),
        additional_special_tokens=list(names[len(_NAMES) :]),
        pad_token=_NAMES[0],
        bos_token=_NAMES[1],
        eos_token=_NAMES[2],
    ).save_pretrained(folder)


def _renumber(config: Any) -> None:
    config.vocab_size = VOCABULARY
    for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        setattr(config, name, number)


def _shrink(config: Any) -> None:
    """Shrink a text model's config in place. Its sizes and the scale of its weights change;
    activation, norms, tying, positions and masks stay those of the base."""
    layers = int(config.num_hidden_layers)
    layers_left = min(LAYERS, layers)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    for name, value in list(vars(config).items()):  # one entry for each layer
        if isinstance(value, list) and len(value) == layers and layers > 1:
            setattr(config, name, value[layers - layers_left :])
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers_left,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS if kv_heads == heads else 1 if kv_heads == 1 else HEADS // 2,
        "head_dim": HIDDEN // HEADS,
        "embedding_size": HIDDEN,
        "initializer_range": HIDDEN**-0.5,  # states and logits of the size that trained ones have
    }
    for name, value in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)


def _scale_lora(lora: LoraTable, before: int, layers: int) -> LoraTable:
    last = lora.last_layers
    if last is not None and last < before:
        in_proportion = round(last * layers / before)
        last = 1 if last == 1 else min(max(2, in_proportion), max(1, layers - 1))
    elif last == before:
        last = layers
    return lora.model_copy(update={"rank": min(lora.rank, RANK), "last_layers": last})
