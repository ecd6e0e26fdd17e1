"""Check that a model keeps nothing of a text that it read.

A loaded model lives as long as the process. Some models keep state of one text when they read the
next: dynamic rotary positions keep the frequencies of the longest text so far, and BigBird turns
sparse attention off for good at the first short text. One patient's record would then change the
results of all records after it. So each network and each teacher reads generated texts before it
reads a record (docs/decisions/0084-no-state-between-records.md)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from fedtune.core.config import Study
from fedtune.core.data.dataset import Dataset
from fedtune.core.errors import ConfigError
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.module_state import KeepsState, build_refusal, describe_state, sum_weights
from fedtune.core.models.network import Network
from fedtune.core.models.random_records import random_records
from fedtune.core.objectives._interface import Batch
from fedtune.core.registry import process_cache

log = logging.getLogger("fedtune.models")
SHORT = (1, 2, 4, 7, 8)  # tokens: 1, 2, 4 and 8 are lengths of padded texts; 7 is padded to 8
BESIDE = 8  # generated records that share a block

# Network -> digests of the plans with which it was checked. A new network is checked for each plan.
_checked: WeakKeyDictionary[Network, set[str]] = process_cache.register(
    "length checks", WeakKeyDictionary()
)


def check_reads(study: Study, network: Network) -> None:
    """Check that the base can read records of the study's length on this machine and keeps nothing
    of them. This runs once per network and plan, before any record is read.

    Without this check, a record that is too long for the base would fail in a round, and so
    disclose its length. Errors: ConfigError if the base cannot read records of this length;
    KeepsState, a kind of ConfigError, if it keeps something of them. The message may leave a site,
    so it does not name the class of a library's error, which would tell whether memory ran out."""
    if study.digest in _checked.setdefault(network, set()):
        return
    longest = study.objective.max_length
    network.check_length(longest)
    try:
        rest = longest - count_placeholders(network, study)
        lengths = order_of(max(1, rest))
        if network.reader.column is not None:
            # Each reading encodes files anew, so there are only four: 8, longest, 1 and 8 tokens.
            lengths = [*lengths[1:3], *lengths[-2:]]
        check_keeps_nothing(study, network, lengths)
    except KeepsState:
        raise
    except Exception as error:
        log.error("a text of up to %d tokens was not read (%s)", longest, type(error).__name__)
        raise ConfigError(
            f"the base cannot read objective.max_length = {longest} tokens here",
            "a length that it reads on this machine",
            "lower objective.max_length; the log of the machine where this happened says more",
        ) from None
    _checked[network].add(study.digest)


def order_of(longest: int) -> list[int]:
    """Return the lengths, up to `longest` tokens, of the generated texts that a model reads for the
    check that it keeps nothing of a text, in the order of reading: short texts, then the longest,
    then the short texts again. If no short text is shorter than `longest`, the longest is read
    twice."""
    short = [length for length in SHORT if length < longest]
    tried = [*short[:1], *short[-1:], longest, *short[-2::-1], *short[-1:]]
    return tried if short else [longest, longest]


def count_placeholders(network: Network, study: Study) -> int:
    """Return the most place-holder tokens that one file takes up in a record, counted on a few
    generated files; 0 if the base reads no files."""
    if network.reader.column is None:
        return 0
    generated = random_records(network, study, BESIDE, 1).examples
    return max(len(example.input_ids) for example in generated) - 1


def check_keeps_nothing(study: Study, network: Network, lengths: Sequence[int]) -> None:
    """Check that the network keeps nothing of generated records. The records go through the same
    code as a site's, and `check_order` compares the network's state and results.

    - study: the plan, which says what a record is made of
    - network: the network that is checked
    - lengths: the records' lengths in tokens, in the order of reading. At the first reading of a
      length one record is read alone, later in a block with others. Records of fewer than 8 tokens
      are always read alone, since a block of them costs as much as a block of the longest

    Errors: KeepsState if the network keeps something; any error of a library that cannot read the
    records."""
    generated = {n: random_records(network, study, BESIDE, n) for n in lengths}

    def read(length: int, again: bool) -> torch.Tensor:
        network.states = WeakValueDictionary()  # the frozen part computes each text anew
        whole = generated[length]
        alone = length < SHORT[-1]
        count = BESIDE if again and not alone else 1
        few = Dataset(whole.examples[:count], count, Counter())
        data = CachedDataset(network, few, alone=alone)

        def read_block(batch: Batch) -> torch.Tensor:
            return network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)

        blocks = data.compute_blocks(read_block, range(count))
        batch, hidden = next(found for found in blocks if found[0].index[0] == 0)
        return hidden[: len(hidden) // len(batch.index)]  # of the first record

    held = network.states
    try:
        check_order(f"the base {network.base.digest}", network.modules, read, lengths)
    finally:
        network.states = held


@torch.no_grad()
def check_order(
    name: str, model: nn.Module, read: Callable[[int, bool], torch.Tensor], lengths: Sequence[int]
) -> None:
    """Check that texts of `lengths`, read in this order, leave `model` unchanged, and that equal
    texts give bit-equal results.

    - name: the model's name, for the error
    - model: the module whose parameters, buffers and attributes are compared after each reading
    - read: read(length, again) returns the model's result for the text of that length; `again` is
      whether the text was read before. The first reading may add state that modules build when they
      are first used
    - lengths: the texts' lengths in tokens, in the order of reading; a length that occurs again
      stands for the same text

    Errors: KeepsState if the model changed, or a text's results differ."""
    results: dict[int, torch.Tensor] = {}
    weights = sum_weights(model)
    before = describe_state(model)
    for number, length in enumerate(lengths):
        again = length in results
        result = read(length, again)
        state = describe_state(model)
        kept = before.items() <= state.items() if number == 0 else before == state
        if not kept:
            raise build_refusal(name, f"a text of {length} tokens changed its state")
        if again and not torch.equal(results[length], result):
            raise build_refusal(
                name, "a text's result depends on what was read before or beside it"
            )
        results.setdefault(length, result)
        before = state
    if sum_weights(model) != weights:
        raise build_refusal(name, "a text changed its weights")
