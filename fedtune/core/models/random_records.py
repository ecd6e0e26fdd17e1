"""Generate records of random tokens, which no data went into, for checks before training."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedtune.core.config import ObjectiveTable, Study
from fedtune.core.data.dataset import NO_TARGET, Dataset, Example, Passage
from fedtune.core.data.media import Media
from fedtune.core.data.records import Record
from fedtune.core.models.network import Network
from fedtune.core.models.random_targets import with_random_targets


class GeneratedFile(NamedTuple):
    """A generated file, with what a record's text needs for it.

    - media: the file; None for a base that reads only text
    - ids: the token ids that stand for the file in the text (place-holders); [] without a file
    - tiles: the number of tiles into which the base splits the file; 1 without a file"""

    media: Media | None
    ids: list[int]
    tiles: int

    def prepend_to(self, ids: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]) -> Passage:
        """Return a passage: first the file's place-holders, which have no targets, and then a text.
        ids: the text's token ids; targets: its targets."""
        placeholders = np.array(self.ids, np.int32)
        no_targets = np.full(len(placeholders), NO_TARGET, np.int32)
        return Passage(np.concatenate([placeholders, ids]), np.concatenate([no_targets, targets]))


def generate_file(
    network: Network,
    objective: ObjectiveTable,
    generator: np.random.Generator,
    like: Media | None = None,
) -> GeneratedFile:
    """Generate a file of noise as `network` reads it, with the place-holders that its text needs.

    - network: the network whose base reads the file
    - objective: the plan's objective, with which the base's reader places the file
    - generator: the source of the noise
    - like: a file whose number of tiles the new one has; None: the reader chooses

    For a base that reads text alone, the result has no file and no place-holders."""
    media = network.reader.generated(generator, like)
    if media is None:
        return GeneratedFile(None, [], 1)
    record, tiles = network.reader.place(Record("", media=media), objective)
    ids = network.tokenizer.encode(record.prompt, add_special_tokens=False)
    return GeneratedFile(media, list(ids), tiles)


def random_ids(
    network: Network, generator: np.random.Generator, count: int, lowest: int = 0
) -> npt.NDArray[np.int32]:
    """Draw random token ids, int32 (count,). None of them is a token that stands for part of a file
    in the text.

    - network: the network whose vocabulary the ids are from
    - generator: the source of the ids
    - count: how many ids are drawn
    - lowest: the smallest id that is drawn. It also replaces each drawn token that stands for part
      of a file, so it must be none of these"""
    ids = generator.integers(lowest, network.vocabulary, size=count, dtype=np.int32)
    ids[np.isin(ids, list(network.reader.avoid))] = lowest
    return ids


def random_records(network: Network, study: Study, count: int = 8, length: int = 16) -> Dataset:
    """Generate `count` units of one record each, drawn from the study's public seed: the same
    records in every call for the same network.

    - network: the network that is to read the records; if its base reads files, each record has a
      file
    - study: the plan, whose objective says what a record is made of
    - count: how many records
    - length: how many tokens each passage has, not counting the place-holders of a file; the tokens
      in its second half are targets"""
    draw = np.random.default_rng(study.study.seed)
    record_format = study.objective.resolved.record_format
    labels = 2 if record_format == "unpaired_preference" else max(1, len(study.objective.labels))

    def passage(file: GeneratedFile) -> Passage:
        ids = random_ids(network, draw, length + 1)
        targets = ids[1:].copy()
        targets[: length // 2] = NO_TARGET
        return file.prepend_to(ids[:-1].copy(), targets)

    examples = []
    for unit in range(count):
        file = generate_file(network, study.objective, draw)
        better, worse = passage(file), passage(file) if record_format == "preference" else None
        examples.append(Example(*better, unit % labels, unit, worse, file.media, file.tiles))
    return with_random_targets(Dataset(examples, count, Counter()), study, network.vocabulary)
