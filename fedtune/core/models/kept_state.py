"""Check that a model keeps nothing of a text that it read.

A model of a library lives as long as the process. Some keep state of a text for the next one:
dynamic rotary positions keep the frequencies of the longest text so far, and BigBird leaves sparse
attention for good at the first short text. One patient's record would then change what is computed
of every other. So each network, and each teacher, reads generated texts before it reads a record
(docs/decisions/0084-no-state-between-records.md)."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from fedtune.core.config import Study
from fedtune.core.data.dataset import Dataset
from fedtune.core.errors import ConfigError
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.random_records import random_records
from fedtune.core.registry import process_cache

log = logging.getLogger("fedtune.models")
SHORT = 8  # tokens
BESIDE = 8  # generated records that share a block
_SMALL = 2**20  # bytes of a tensor up to which its content is compared, not its writes
_TABLES = ("_modules", "_parameters", "_buffers")  # of a module
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)

# By network, so that another network is checked anew, also where the plan is an earlier one.
_checked: WeakKeyDictionary[Network, set[str]] = process_cache.register(
    "length checks", WeakKeyDictionary()
)


class KeepsState(ConfigError):
    """A base or teacher keeps state of a text that it read; no record is read with it."""


def check_reads(study: Study, network: Network) -> None:
    """Check that the base reads records of the study's length on this machine and keeps nothing
    of them, once per network and plan, before any record is read.

    A record that is too long would fail, and so disclose its length. Errors: ConfigError
    (KeepsState), whose message may leave a site: it does not even hold the class of a library's
    error, which would tell whether memory ran out."""
    if study.digest in _checked.setdefault(network, set()):
        return
    longest = study.objective.max_length
    network.check_length(longest)
    # With a file, a record's length follows from the file's place-holders too.
    lengths = (
        (SHORT, longest, SHORT) if network.reader.column is None else (SHORT, 2 * SHORT, SHORT)
    )
    try:
        check_keeps_nothing(study, network, lengths)
    except KeepsState:
        raise
    except Exception as error:
        log.error("a text of %d tokens was not read (%s)", longest, type(error).__name__)
        raise ConfigError(
            f"the base cannot read objective.max_length = {longest} tokens here",
            "a length that it reads on this machine",
        ) from None
    _checked[network].add(study.digest)


def check_keeps_nothing(study: Study, network: Network, lengths: Sequence[int]) -> None:
    """Check, as `check_order`, that the network keeps nothing of generated records of `lengths`,
    through the code that reads records. A length's second and later readings are beside others.
    Errors: KeepsState; whatever a library raises that cannot read them."""
    generated = {n: random_records(network, study, BESIDE, n) for n in lengths}

    def read(length: int, again: bool) -> torch.Tensor:
        network.states = WeakValueDictionary()  # the frozen part computes each text anew
        whole = generated[length]
        count = BESIDE if again else 1
        data = CachedDataset(network, Dataset(whole.examples[:count], count, Counter()))
        batch = next(data.blocks(range(count)))
        hidden = network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
        return hidden[: len(hidden) // len(batch.index)]  # of the first record

    held = network.states
    try:
        check_order(network.base.name, network.modules, read, lengths)
    finally:
        network.states = held


@torch.no_grad()
def check_order(
    name: str, model: nn.Module, read: Callable[[int, bool], torch.Tensor], lengths: Sequence[int]
) -> None:
    """Check that reading texts of `lengths`, in this order, gives equal results for equal texts,
    to the last bit, and changes nothing of `model`. read: returns what the model computes of the
    text of that length; its second argument: whether the text was read before. Only the first
    reading may add what is built when it is first needed. Errors: KeepsState."""
    results: dict[int, torch.Tensor] = {}
    before = _state_of(model)
    for number, length in enumerate(lengths):
        again = length in results
        result = read(length, again)
        state = _state_of(model)
        kept = before.items() <= state.items() if number == 0 else before == state
        if not kept:
            raise _refusal(name, f"a text of {length} tokens changed its state")
        if again and not torch.equal(results[length], result):
            raise _refusal(name, "a text's result depends on what was read before or beside it")
        results.setdefault(length, result)
        before = state


def _refusal(name: str, found: str) -> KeepsState:
    return KeepsState(
        f"{name} keeps state of what it reads ({found})",
        "a model that computes each text as if it had read no other",
        "use another base or teacher, or a smaller objective.max_length; no record was read",
    )


def _state_of(model: nn.Module) -> dict[str, object]:
    """Describe everything that modules hold: parameters, buffers and plain attributes."""
    seen: dict[int, object] = {}
    state: dict[str, object] = {}
    for path, module in model.named_modules():
        held = {n: v for n, v in vars(module).items() if n not in _TABLES}
        for name, value in (held | module._parameters | module._buffers).items():
            # A table's entries one by one: transformers adds hooks at the first reading.
            entries = value if isinstance(value, dict) else {None: value}
            for key, entry in entries.items():
                state[f"{path}/{name}/{key!r}"] = _describe(entry, seen)
    return state


def _describe(value: Any, seen: dict[int, object]) -> object:
    """Describe a value so that it compares equal as long as nothing writes to it."""
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = id(value)  # of a value that holds itself
    inner: list[object]
    if isinstance(value, dict):
        inner = [(_describe(k, seen), _describe(v, seen)) for k, v in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        inner = [_describe(item, seen) for item in value]
    elif isinstance(value, nn.Module | type) or callable(value) or not hasattr(value, "__dict__"):
        return id(value)  # a module is described where it is a child; a function by what it is
    else:
        inner = [type(value).__name__, _describe(vars(value), seen)]
    seen[id(value)] = described = repr(inner)
    return described


def _describe_tensor(tensor: torch.Tensor) -> object:
    if tensor.nbytes > _SMALL or tensor.is_meta:
        return tensor.data_ptr(), tensor._version, tuple(tensor.shape)  # PyTorch counts writes
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest(), tuple(tensor.shape)
