"""A base or teacher that keeps state of one text for the next is refused before a record is read.

Twins: BigBird, which leaves sparse attention for good at the first short text; dynamic rotary
positions, which keep the frequencies of the longest text; a base that adds up its neighbours."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BigBirdConfig, BigBirdModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from fedtune.core.bases.find import find_base, load_tokenizer
from fedtune.core.config import Study
from fedtune.core.data.dataset import Example
from fedtune.core.data.files import Rejected
from fedtune.core.data.records import Record
from fedtune.core.errors import PolicyRefused
from fedtune.core.models.build import build
from fedtune.core.models.kept_state import SHORT, KeepsState, check_order, check_reads, order_of
from fedtune.core.models.loaded import load
from fedtune.core.models.network import Network
from fedtune.core.models.teacher import teacher_for
from fedtune.core.registry import process_cache
from fedtune.core.training import selftest
from fedtune.core.vault import site_checks
from tests.dp.conftest import study

LABELS = ["a", "b"]
CLASSIFY = {"name": "classify", "labels": LABELS, "max_length": 64}
PRIVACY = {"noise_multiplier": 1.6, "delta": 1e-4}
LORA = {"modules": ["q_proj"], "last_layers": 2, "rank": 4}


@pytest.fixture(params=[8, 1])
def big_bird(request: pytest.FixtureRequest, tmp_path: Path, tiny_encoder: Path) -> Path:
    """A random BigBird that attends sparsely from 48 tokens on, or from 8."""
    folder = tmp_path / "big-bird"
    tokenizer = load_tokenizer(find_base(str(tiny_encoder)))
    torch.manual_seed(0)
    config = BigBirdConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        block_size=request.param,
        num_random_blocks=1,
    )
    BigBirdModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def dynamic(tmp_path: Path, tiny_base: Path) -> Path:
    """A random Llama of 64 positions whose frequencies follow from the longest text beyond."""
    folder = tmp_path / "dynamic"
    tokenizer = load_tokenizer(find_base(str(tiny_base)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def of(base: Path, **changes: Any) -> Study:
    return study(**{"base": {"model": str(base)}, "lora": LORA, "privacy": PRIVACY} | changes)


def distilled(student: Path, teacher: Path, digest: str, **changes: Any) -> Study:
    options = {"teacher": str(teacher), "digest": digest}
    return of(student, objective={"name": "distill", "options": options, **changes})


def fresh(made: Study) -> Network:
    process_cache.clear("networks")
    return build(made)


@pytest.mark.parametrize("lora", [LORA, {"modules": ["gate_proj"], "last_layers": 1}])
def test_a_base_that_keeps_nothing_passes(tiny_base: Path, lora: dict[str, Any]) -> None:
    made = of(tiny_base, lora=lora)
    site_checks.check_models(made, fresh(made))


def test_an_encoder_that_keeps_nothing_passes(tiny_encoder: Path) -> None:
    made = of(tiny_encoder, lora=None, objective=CLASSIFY)
    site_checks.check_models(made, fresh(made))


@pytest.mark.parametrize("lora", [LORA, {"modules": ["q_proj"], "rank": 4}])
def test_a_base_that_its_first_text_changes_for_good_is_refused(
    tiny_base: Path, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first text is the one by which a cut is tried."""
    forward, begun = LlamaMLP.forward, LlamaMLP.__init__

    def begin(self: Any, *given: Any) -> None:
        begun(self, *given)
        self.is_new = True

    def run(self: Any, states: torch.Tensor) -> torch.Tensor:
        self.is_new = False
        return forward(self, states)

    monkeypatch.setattr(LlamaMLP, "__init__", begin)
    monkeypatch.setattr(LlamaMLP, "forward", run)
    made = of(tiny_base, lora=lora)
    try:
        site_checks.check_models(made, fresh(made))
        refused = ""
    except (KeepsState, PolicyRefused) as error:
        refused = str(error)
    finally:
        process_cache.clear("networks")
    assert "keeps state of what it reads" in refused


def test_a_base_that_leaves_sparse_attention_for_good_is_refused(big_bird: Path) -> None:
    made = of(big_bird, lora=None, objective=CLASSIFY)
    with pytest.raises(PolicyRefused, match="keeps state of what it reads"):
        site_checks.check_models(made, fresh(made))


def test_the_self_test_refuses_it_too(big_bird: Path) -> None:
    made = of(big_bird, lora=None, objective=CLASSIFY)
    results = {result.name: result for result in selftest.run(made)}
    assert not results["isolation"].passed, results
    assert results["isolation"].note.startswith("KeepsState")


def _coupled(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = Network.prefix

    def mixed(network: Network, *inputs: Any) -> torch.Tensor:
        states = prefix(network, *inputs)
        return states + 0.1 * states.mean(dim=0, keepdim=True)

    monkeypatch.setattr(Network, "prefix", mixed)


def test_a_base_that_adds_up_its_neighbours_is_refused(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _coupled(monkeypatch)
    made = of(tiny_base)
    with pytest.raises(KeepsState, match="beside it"):
        check_reads(made, fresh(made))


def test_isolation_sees_what_couples_records_below_the_cut(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States that an engine holds are not handed to the next one."""
    _coupled(monkeypatch)
    monkeypatch.setattr(selftest, "_check_lengths", lambda *_: 0.0)
    results = {result.name: result for result in selftest.run(of(tiny_base))}
    assert not results["isolation"].passed and results["isolation"].figure > 0


def test_another_network_is_checked_anew(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = of(tiny_base)
    first = fresh(made)
    check_reads(made, first)
    site_checks.check_learns(made, first, None)
    read: list[Network] = []
    learnt: list[Network] = []
    prefix = Network.prefix

    def counted(network: Network, *inputs: Any) -> torch.Tensor:
        read.append(network)
        return prefix(network, *inputs)

    monkeypatch.setattr(Network, "prefix", counted)
    monkeypatch.setattr(site_checks, "check_trains", lambda _, network, *__: learnt.append(network))
    second = fresh(made)
    for network in (first, second, second):
        check_reads(made, network)
        site_checks.check_learns(made, network, None)
    assert (
        len(read) == len(order_of(made.objective.max_length))
        and set(read) == {second}
        and learnt == [second]
    )


class _Reader(nn.Module):
    """Reads a text; `change` says what it keeps of it."""

    def __init__(self, change: Callable[[_Reader, int], object]) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(4))
        self.change = change

    def forward(self, length: int) -> torch.Tensor:
        self.change(self, length)
        return torch.full((2,), float(length))


def _build_once(reader: _Reader, length: int) -> None:
    if not hasattr(reader, "built"):
        reader.built = torch.arange(4)
        reader.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("longest", [1, 2, 5, 8, 64])
def test_every_short_length_is_read_between_two_readings_of_one(longest: int) -> None:
    lengths = order_of(longest)
    assert {*(n for n in SHORT if n <= longest), longest} == set(lengths)
    assert lengths.count(lengths[-1]) > 1


class _Slots:
    __slots__ = ("length",)


class _Callable:
    length = 0

    def __call__(self) -> int:
        return self.length


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any, int], object]]] = {
    "array": (lambda: np.zeros(4), lambda held, length: held.fill(length)),
    "deque": (lambda: deque(maxlen=2), lambda held, length: held.append(length)),
    "slots": (_Slots, lambda held, length: setattr(held, "length", length)),
    "callable": (_Callable, lambda held, length: setattr(held, "length", length)),
    "generator": (torch.Generator, lambda held, length: torch.rand(1, generator=held)),
    "iterator": (itertools.count, lambda held, length: next(held)),
    "weight": (
        lambda: nn.Parameter(torch.zeros(2**19), requires_grad=False),
        lambda held, length: held.data[-1].fill_(length),
    ),
}


@pytest.mark.parametrize("kind", HELD)
def test_whatever_a_module_holds_is_compared_by_its_content(kind: str) -> None:
    """Also a weight of more than 1 MiB, written past the count of its writes. Twin: no write."""
    make, change = HELD[kind]
    for changes in (False, True):
        reader = _Reader(lambda reader, n: change(reader.held, n) if changes else None)  # noqa: B023
        reader.held = make()
        try:
            check_order("base", reader, lambda length, _: reader(length), (8, 16, 8))  # noqa: B023
            refused = False
        except KeepsState:
            refused = True
        assert refused == changes


def test_what_is_built_at_the_first_reading_may_stay() -> None:
    reader = _Reader(_build_once)
    check_order("base", reader, lambda length, _: reader(length), (8, 16, 8))


@pytest.mark.parametrize(
    "change",
    [
        lambda reader, length: reader.table.fill_(length),
        lambda reader, length: setattr(reader, "longest", length),
        lambda reader, length: reader.__dict__.setdefault("seen", []).append(length),
        lambda reader, length: reader.__dict__.setdefault("masks", {}).update({length: None}),
    ],
    ids=["buffer", "attribute", "list", "table"],
)
def test_what_changes_with_a_reading_may_not(change: Callable[[_Reader, int], object]) -> None:
    reader = _Reader(change)
    with pytest.raises(KeepsState, match="changed its state"):
        check_order("base", reader, lambda length, _: reader(length), (8, 16, 8))


# ----------------------------------------------------------------------------------- teachers


def test_a_teacher_that_keeps_nothing_passes(tiny_base: Path) -> None:
    made = distilled(tiny_base, tiny_base, find_base(str(tiny_base)).digest)
    site_checks.check_models(made, fresh(made))


def test_a_teacher_with_sparse_attention_is_refused(
    tmp_path: Path, tiny_encoder: Path, big_bird: Path
) -> None:
    run = tmp_path / "run"
    base = {"model": str(big_bird), "digest": find_base(str(big_bird)).digest}
    trained = study(base=base, lora=None, objective=CLASSIFY, privacy=PRIVACY)
    fresh(trained).save(run / "adapter")
    (run / "plan.json").write_text(trained.model_dump_json())
    made = distilled(tiny_encoder, run, load(run).digest, labels=LABELS, max_length=64)
    made = made.model_copy(update={"lora": None})
    with pytest.raises(PolicyRefused, match="keeps state of what it reads"):
        site_checks.check_models(made, fresh(made))


def test_frequencies_of_the_longest_text_are_seen(dynamic: Path) -> None:
    model = load(dynamic)
    texts = {length: np.arange(length, dtype=np.int32) for length in (8, 80, 120)}
    for longest, refused in ((64, False), (120, True)):
        texts[longest] = np.arange(longest, dtype=np.int32)
        try:
            check_order("t", model.model, lambda n, _: model.hidden(texts[n]), (8, longest, 8))
            assert not refused
        except KeepsState:
            assert refused


def test_a_record_beyond_the_teachers_positions_is_left_out_by_itself(
    dynamic: Path, tiny_base: Path
) -> None:
    """Else the frequencies of its length would teach every other record."""
    teach = teacher_for(distilled(tiny_base, dynamic, load(dynamic).digest, max_length=128))
    assert teach is not None

    def example(length: int) -> Example:
        ids = np.arange(3, 3 + length, dtype=np.int32)
        return Example(ids, np.append(ids[1:], 3).astype(np.int32), -100, 0)

    before = teach(Record("other"), example(64))
    for length in (65, 120):
        with pytest.raises(Rejected, match="too long"):
            teach(Record("patient"), example(length))
    assert np.array_equal(before.logp, teach(Record("other"), example(64)).logp)
