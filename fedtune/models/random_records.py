"""Generated records: random tokens that never saw any data, for checks before training."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedtune.config import ObjectiveTable, Study
from fedtune.data.dataset import NO_TARGET, Dataset, Example, Passage
from fedtune.data.media import Media
from fedtune.data.records import Record
from fedtune.models.network import Network
from fedtune.models.teacher import made_up
from fedtune.objectives import resolve


class Shown(NamedTuple):
    """A generated file, the ids of its place-holders, and its number of tiles; of a base that reads
    text alone: None, nothing, 1."""

    media: Media | None
    ids: list[int]
    tiles: int

    def before(self, ids: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]) -> Passage:
        """The place-holders, then a text."""
        held = np.array(self.ids, np.int32)
        none = np.full(len(held), NO_TARGET, np.int32)
        return Passage(np.concatenate([held, ids]), np.concatenate([none, targets]))


def show(
    network: Network,
    objective: ObjectiveTable,
    draw: np.random.Generator,
    like: Media | None = None,
) -> Shown:
    """A file of noise as `network` reads it, with as many tiles as `like`."""
    media = network.reader.generated(draw, like)
    if media is None:
        return Shown(None, [], 1)
    record, tiles = network.reader.place(Record("", media=media), objective)
    ids = network.tokenizer.encode(record.prompt, add_special_tokens=False)
    return Shown(media, list(ids), tiles)


def words(
    network: Network, draw: np.random.Generator, count: int, lowest: int = 0
) -> npt.NDArray[np.int32]:
    """Random token ids, none of which stands for an image."""
    ids = draw.integers(lowest, network.vocabulary, size=count, dtype=np.int32)
    ids[np.isin(ids, list(network.reader.avoid))] = lowest
    return ids


def random_records(network: Network, study: Study, count: int = 8, length: int = 16) -> Dataset:
    """`count` units of one record each, drawn from the study's public seed."""
    draw = np.random.default_rng(study.study.seed)
    record_format = resolve(study.objective).record_format
    labels = 2 if record_format == "unpaired_preference" else max(1, len(study.objective.labels))

    def passage(shown: Shown) -> Passage:
        ids = words(network, draw, length + 1)
        targets = ids[1:].copy()
        targets[: length // 2] = NO_TARGET
        return shown.before(ids[:-1].copy(), targets)

    examples = []
    for unit in range(count):
        shown = show(network, study.objective, draw)
        own, worse = passage(shown), passage(shown) if record_format == "preference" else None
        examples.append(Example(*own, unit % labels, unit, worse, shown.media, shown.tiles))
    return made_up(Dataset(examples, count, Counter()), study, network.vocabulary)
