"""Hand a dataset from one process of a site to the others, as a header and tensors, not by pickle.

Guarantee: a site's records are read once, by the process that keeps its ledger. Other processes
train on what that process read, whatever the files hold by then."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedtune.core.data.dataset import Dataset, Example, Passage, SoftTargets
from fedtune.core.data.media import Media


def fingerprint(dataset: Dataset) -> str:
    """Return the sha256, in hexadecimal, over all that training reads of each record, in the
    records' order. If two datasets have the same fingerprint, each row is the same record in
    both."""
    total = hashlib.sha256(f"{dataset.n_units} ".encode())
    for example in dataset.examples:
        media = example.media.digest.hex() if example.media else ""
        total.update(f"{example.unit} {example.label} {example.tiles} {media} ".encode())
        for passage in example.passages:
            parts = (passage.input_ids.tobytes(), passage.target_ids.tobytes())
            total.update(f"{len(parts[0])} ".encode() + b"".join(parts))
        if example.soft is not None:
            total.update(f"{example.soft.tokens.shape} ".encode())
            total.update(example.soft.tokens.tobytes() + example.soft.logp.tobytes())
    return total.hexdigest()


def pack_records(dataset: Dataset) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Return a dataset as a header (for JSON) and a list of tensors, which hold everything on which
    it trains: token ids, targets, labels, units, soft targets and media files. What only the ledger
    needs (keys and members) and the counts of rejected rows are left out."""
    examples = dataset.examples
    passages = [passage for example in examples for passage in example.passages]
    soft = [example.soft for example in examples if example.soft is not None]
    media = list({e.media.digest: e.media for e in examples if e.media}.values())
    number = {file.digest: at for at, file in enumerate(media)}
    of_example = [
        (e.label, e.unit, e.tiles, number[e.media.digest] if e.media else -1) for e in examples
    ]
    header = {
        "units": dataset.n_units,
        "passages": len(examples[0].passages) if examples else 1,
        "outcomes": soft[0].tokens.shape[1] if soft else 0,
        "media": [(file.kind, len(file.body)) for file in media],
    }
    arrays = [
        np.array(of_example, np.int64).reshape(len(examples), 4),
        np.array([len(passage.input_ids) for passage in passages], np.int64),
        _join_arrays([passage.input_ids for passage in passages], np.int32),
        _join_arrays([passage.target_ids for passage in passages], np.int32),
        np.array([len(mark.tokens) for mark in soft], np.int64),
        _join_arrays([mark.tokens.ravel() for mark in soft], np.int32),
        _join_arrays([mark.logp.ravel() for mark in soft], np.float32),
        _join_arrays([np.frombuffer(file.body, np.uint8) for file in media], np.uint8),
    ]
    return header, [torch.from_numpy(array) for array in arrays]


def unpack_records(header: dict[str, Any], tensors: Sequence[torch.Tensor]) -> Dataset:
    """Rebuild a dataset from the header and the tensors that `pack_records` returned."""
    of_example, lengths, ids, targets, soft_lengths, tokens, logp, bodies = (
        tensor.numpy() for tensor in tensors
    )
    files = [
        Media.of(kind, body.tobytes())
        for (kind, _), body in zip(
            header["media"], _parts(bodies, [size for _, size in header["media"]]), strict=True
        )
    ]
    passages = list(map(Passage, _parts(ids, lengths), _parts(targets, lengths)))
    n_passages, outcomes = header["passages"], header["outcomes"]
    marks: list[SoftTargets | None] = [None] * len(of_example)
    if outcomes:
        of_tokens = _parts(tokens, soft_lengths * outcomes)
        of_logp = _parts(logp, soft_lengths * outcomes)
        marks = [
            SoftTargets(one.reshape(-1, outcomes), other.reshape(-1, outcomes))
            for one, other in zip(of_tokens, of_logp, strict=True)
        ]
    examples = []
    for at, (label, unit, tiles, file) in enumerate(of_example.tolist()):
        own = passages[at * n_passages : (at + 1) * n_passages]
        examples.append(
            Example(
                input_ids=own[0].input_ids,
                target_ids=own[0].target_ids,
                label=label,
                unit=unit,
                rejected=own[1] if n_passages == 2 else None,
                media=files[file] if file >= 0 else None,
                tiles=tiles,
                soft=marks[at],
            )
        )
    return Dataset(examples, header["units"], Counter())


def _join_arrays(parts: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate([np.asarray(part, dtype) for part in parts] or [np.empty(0, dtype)])


def _parts(joined: npt.NDArray[Any], lengths: npt.ArrayLike) -> list[npt.NDArray[Any]]:
    if len(ends := np.cumsum(lengths, dtype=np.int64)) == 0:
        return []
    return np.split(joined, ends[:-1])
