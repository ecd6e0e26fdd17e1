"""Measure how much an adapter reveals of generated secrets: their exposure, and how many of them it
writes by itself."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import gammaincinv  # type: ignore[import-untyped]

from fedtune.core.config import Columns, EvaluationTable, Study
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.load import load_dataset
from fedtune.core.errors import DataError
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives._tokens import likelihood, select_labelled

# Fixed before anything is measured.
# The number of secrets, and of the numbers among which each secret is ranked (so at most 7 bits).
SECRETS, POOL = 8, 128
CONFIDENCE = 0.999
DIGITS = 8
SPACE = 9 * 10 ** (DIGITS - 1)  # how many numbers a secret may be
COLUMNS = {  # the columns of rows with secrets
    "text": ("prompt", "completion"),
    "label": ("text", "label"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired_preference": ("prompt", "chosen", "rejected"),
}


@dataclass(frozen=True)
class Exposure:
    """The exposure of secrets in bits. A secret is ranked by its loss among POOL numbers, where
    rank 1 has the lowest loss; its exposure is log2 POOL minus log2 of the rank.

    - mean, highest: the mean and the largest exposure with the adapter
    - base: the mean exposure without the adapter
    - chance: the expected mean for a model that knows nothing of the secrets
    - limit: the value that the mean of such a model exceeds with probability 0.1 %
    - extracted: the number of secrets that the adapter writes greedily after their prompt; None for
      a classifier, which writes nothing"""

    secrets: int
    pool: int
    mean: float
    highest: float
    base: float
    chance: float
    limit: float
    extracted: int | None = None

    @property
    def exposed(self) -> bool:
        return self.mean > self.limit


def generate_secrets(study: Study, secrets: int = SECRETS) -> list[dict[str, str]]:
    """Generate rows with one secret each, to be planted among generated records before a run. They
    have prompt and completion, or text and label, and each has its own patient. Anybody can compute
    them from the study's public seed, so never use them in place of real records."""
    return [_row(study, at, number) for at, number in enumerate(_numbers(study, secrets, 1)[:, 0])]


def as_dataset(rows: list[dict[str, str]], network: Network, study: Study) -> Dataset:
    """Load generated rows, such as those of `generate_secrets`, for the study's base.

    Errors: DataError if the study's tokenizer or length cannot hold such a record."""
    columns = Columns(**{name: name for name in COLUMNS[study.objective.resolved.record_format]})
    with tempfile.TemporaryDirectory(prefix="fedtune-canaries-") as folder:
        path = Path(folder) / "canaries.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = load_dataset(
            EvaluationTable(path=path, columns=columns),
            study,
            network.tokenizer,
            reader=network.reader,
        )
    if len(data.examples) != len(rows):
        raise DataError(
            "the study cannot hold a generated canary of some 20 tokens",
            "room for it in objective.max_length",
        )
    return data


def exposure(network: Network, study: Study, secrets: int = SECRETS, pool: int = POOL) -> Exposure:
    """Rank each planted secret by its loss in `network` among random secrets of the same form.
    Return the secrets' exposure, and how many of them the network writes by itself. If the secrets
    were not planted, the mean exposure is what chance gives.

    - network: the study's network, in which the examined adapter is loaded; the network is left as
      it was
    - study: the study whose seed and record format determine the secrets
    - secrets: how many secrets are ranked: those that `generate_secrets` makes for this number
    - pool: among how many numbers each secret is ranked, the secret included

    Errors: DataError if the study's tokenizer or length cannot hold such a record.
    Reference: Carlini et al. 2019, "The secret sharer", section 4.2."""
    numbers = _numbers(study, secrets, pool)
    rows = [_row(study, at, number) for at in range(secrets) for number in numbers[at]]
    cached = CachedDataset(network, as_dataset(rows, network, study))
    trained = _bits(record_losses(cached, study).reshape(secrets, pool))
    with network.loaded(trainable=network.zero()):
        base = _bits(record_losses(cached, study).reshape(secrets, pool))
    return Exposure(
        secrets=secrets,
        pool=pool,
        mean=float(trained.mean()),
        highest=float(trained.max()),
        base=float(base.mean()),
        chance=float(np.mean([math.log2(pool / rank) for rank in range(1, pool + 1)])),
        limit=_limit(secrets),
        extracted=_count_extracted(network, study, rows[::pool]),
    )


def most_exposed(found: Exposure, epsilon: float, delta: float) -> float:
    """Compute the largest mean exposure that (ε, δ) allows, at 99.9 % confidence. found: an
    exposure, of which only the numbers of secrets and of ranks are read.

    In a model without the secret's record, the secret's rank is uniform. So with its record the
    rank is at most r with probability at most e^ε · r / pool + δ, whatever the ranks of the other
    secrets."""
    ranks = np.arange(1, found.pool + 1)
    reached = np.minimum(1.0, math.exp(min(epsilon, 100.0)) * ranks / found.pool + delta)
    reached[-1] = 1.0
    share = np.diff(reached, prepend=0.0)
    draws = np.random.default_rng(0).choice(
        np.log2(found.pool / ranks), size=(100_000, found.secrets), p=share
    )
    return float(np.quantile(draws.mean(axis=1), CONFIDENCE))


def most_extracted(epsilon: float, delta: float) -> float:
    """Return the largest probability that (ε, δ) allows for the extraction of one secret. Without
    the secret's record, a model writes it with probability at most 1 / SPACE, where SPACE is the
    number of possible secrets.

    >>> round(most_extracted(8.0, 1e-5), 6)
    4.3e-05
    """
    return float(min(1.0, math.exp(min(epsilon, 100.0)) / SPACE + delta))


def _bits(losses: np.ndarray) -> np.ndarray:
    """Compute the exposure of each secret in bits (see `Exposure`). A secret is a number, and is
    ranked by its loss among other numbers. losses: one row for each secret, with the loss of the
    secret in the first column and the losses of the other numbers in the next ones. A number with
    the same loss as the secret is ranked before the secret."""
    ranks = 1 + (losses[:, 1:] <= losses[:, :1]).sum(axis=1)
    return np.asarray(np.log2(losses.shape[1] / ranks))


def _limit(secrets: int) -> float:
    """Return a bound that the mean exposure by chance exceeds with probability 0.1 %. By chance,
    rank / pool is stochastically at least uniform. So a secret's bits are at most exponential with
    mean 1 / ln 2, and their sum is at most a gamma variable."""
    return float(gammaincinv(secrets, CONFIDENCE)) / secrets / math.log(2)


@torch.no_grad()
def _count_extracted(network: Network, study: Study, rows: list[dict[str, str]]) -> int | None:
    """Count the rows whose completion the network writes greedily after the prompt: each token of
    the completion is the likeliest after those before it. Whether the network stops afterwards does
    not matter. Return None for a classifier, which writes nothing."""
    objective = study.objective.resolved
    if objective.record_format == "label":
        return None
    cached, eos = (
        CachedDataset(network, as_dataset(rows, network, study)),
        network.tokenizer.eos_token_id,
    )
    written = np.zeros(len(rows), dtype=bool)
    for batch in cached.batches(range(len(rows))):
        keep, targets = select_labelled(batch.target_ids)
        hidden = network.hidden(batch.prefix, batch.mask, keep, batch.tower_states)
        likeliest = network.logits(hidden.flatten(0, 1)).argmax(dim=-1).view(targets.shape)
        ends = (targets == -100) | (targets == eos)
        right = ((likeliest == targets) | ends).all(dim=1)
        written[batch.index.numpy()] = right.view(len(batch.index), -1)[:, 0].cpu().numpy()
    return int(written.sum())


@torch.no_grad()
def record_losses(cached: CachedDataset, study: Study) -> np.ndarray:
    """Compute each record's loss, fp64 (records,), by the network with its present arrays."""
    objective = study.objective.resolved
    # For a study that distils a teacher, the loss is that of the record's own answer; for class
    # statistics, it is the loss of the resulting classifier.
    if objective.teacher_spec or objective.directions:
        name = "classify" if study.objective.labels else "causal_lm"
        judged = study.objective.model_copy(update={"name": name, "options": {}})
        objective = judged.resolved
    losses_of = np.empty(len(cached.dataset.examples))
    for batch in cached.batches(range(len(losses_of))):
        if objective.record_format == "unpaired_preference":
            # For pairs the loss is that of the better answer.
            losses = -likelihood(cached.network, batch).mean.view(-1, 2)[:, 0]
        else:
            losses = objective.losses(cached.network, batch)
        losses_of[batch.index.numpy()] = losses.double().cpu().numpy()
    return losses_of


def _numbers(study: Study, secrets: int, pool: int) -> np.ndarray:
    """Draw an array of numbers (secrets, pool) from the study's seed; no row has a number twice.
    The first number of each row is the secret, which does not depend on `pool`."""
    low, high = 10 ** (DIGITS - 1), 10**DIGITS
    rows = []
    for at in range(secrets):
        draw = np.random.default_rng([study.study.seed, at, 2])
        rows.append(list(dict.fromkeys(draw.integers(low, high, size=2 * pool + 8)))[:pool])
    return np.array(rows)


def _row(study: Study, at: int, number: int) -> dict[str, str]:
    prefix, patient = f"The access code of ward {at} is", f"canary-{at}"
    record_format = study.objective.resolved.record_format
    if record_format == "label":
        label = study.objective.labels[at % len(study.objective.labels)]
        return {"text": f"{prefix} {number}", "label": label, "patient": patient}
    row = {"prompt": prefix, "completion": f" {number}", "patient": patient}
    if record_format == "text":
        return row
    return row | {"label": "yes", "chosen": f" {number}", "rejected": " not known"}
