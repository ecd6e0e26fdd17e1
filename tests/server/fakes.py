"""A coordinator over fake sites: real Flower messages, no model, deterministic updates."""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fedtune.core.vault.answers
import fedtune.launch.in_one_process
from fedtune.core.config import Encoding, Study
from fedtune.core.files.room import Room
from fedtune.core.vault.prepared import Admission, Unprepared, Update
from fedtune.core.wire.codec import Shapes, decode, encode
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import Header, seal
from fedtune.flower.grid import InProcessGrid
from fedtune.server import rounds
from fedtune.server.parts import Dependencies, Settings

SHAPES = {"layer.B": (3, 2), "layer.C": (4,)}
EVENT = {"sigma": 1.5, "q": 0.25, "max_grad_norm": 1.0, "records": 1}

QUERY = {"sigma": 2.0, "q": 1.0, "max_grad_norm": 2**0.5, "records": 1}


def zeros() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


HOMES = mkdtemp(prefix="fedtune-fakes-")
atexit.register(shutil.rmtree, HOMES, True)


@dataclass
class FakeSite:
    """Moves the adapter towards its own target. `script` may replace what a round answers:
    an exception to raise, or a function of the honest update."""

    name: str
    size: int = 100
    script: dict[int, Any] = field(default_factory=dict)  # n-th call of train (from 1) -> what
    refusal: str = ""
    prepare_error: Exception | None = None
    calls: list[int] = field(default_factory=list)  # the round of each call of train
    prepared: int = 0
    finished: int = 0
    known: bool = False
    steps: int = 0
    answers: dict[int, Any] = field(
        default_factory=dict
    )  # n-th call of evaluate -> what, as script
    asked: list[int] = field(default_factory=list)  # the round of each call of evaluate
    key: SigningKey = field(default_factory=SigningKey)
    base: str = ""
    encoding: Encoding = "float32"
    coordinator: str = ""
    receipts: list[str] = field(default_factory=list)
    folder: Path = field(default_factory=lambda: Path(mkdtemp(dir=HOMES)), compare=False)

    @property
    def home(self) -> Any:
        """Where its audit log lies, and who signed there: nobody."""
        return SimpleNamespace(
            folder=self.folder,
            key=self.key,
            admitted=lambda *_: False,
            check_not_frozen=lambda: None,
        )

    def current(self) -> Any:
        return self.site

    @property
    def site(self) -> Any:
        policy = SimpleNamespace(admission="standing", own_memberships=frozenset({""}))
        table = SimpleNamespace(
            name=self.name, declared_size=self.size, plan_file=lambda _: self.folder / "plan.json"
        )
        return SimpleNamespace(site=table, policy=policy)

    def of_run(self, digest: str) -> FakeSite:
        return self

    def begin_run(self, digest: str) -> FakeSite:
        return self

    def keep_run(self, digest: str, of_run: FakeSite) -> None:
        pass

    @property
    def room(self) -> Room:
        return Room(self.folder, self.size)

    def room_to_answer(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self, study: Study, frozen: dict[str, np.ndarray], coordinator: str) -> Admission:
        self.coordinator, self.base = coordinator, study.base.digest or ""
        self.encoding = study.wire.update
        self.prepared += 1
        if self.prepare_error:
            raise self.prepare_error
        self.known = not self.refusal
        return Admission(self.known, self.refusal, self.name, self.size)

    def end_run(self, digest: str) -> None:
        self.finished += 1

    def coordinator_of(self, digest: str) -> str:
        if not self.known:
            raise Unprepared("this site does not know the plan")
        return self.coordinator

    def sealed(self, digest: str, round_: int, nonce: str, body: str) -> dict[str, str]:
        ledger = {"token": f"{round_:02x}"}
        header = Header(digest, round_, self.base, self.name, self.coordinator, nonce, body, ledger)
        return seal(self.key, header)

    def train(
        self, digest: str, round_: int, adapter: dict[str, np.ndarray], receipt: str
    ) -> Update:
        self.calls.append(round_)
        self.receipts.append(receipt)
        self.steps += 1
        rng = np.random.default_rng([round_, *self.name.encode()])
        delta = {
            n: (0.5 * (rng.standard_normal(a.shape) - a)).astype(np.float32)
            for n, a in adapter.items()
        }
        update = Update(delta, [{**EVENT, "steps": self.steps}])
        made = self._scripted(self.script.get(len(self.calls)), update)
        return Update(encode(made.delta, self.encoding), made.events, made.said)

    def shapes(self, digest: str) -> Shapes:
        return SHAPES

    def evaluate(
        self, digest: str, round_: int, adapter: dict[str, np.ndarray], receipt: str
    ) -> Update:
        self.asked.append(round_)
        self.receipts.append(receipt)
        sums = np.array([self.size / 4, self.size], np.float32)  # a likelihood of 0.25
        update = Update(encode({"sums": sums}, "float32"), [{**QUERY, "steps": len(self.asked)}])
        return self._scripted(self.answers.get(len(self.asked)), update)

    def _scripted(self, what: Any, update: Update) -> Update:
        if isinstance(what, BaseException):
            raise what
        return what(update) if what else update


def make_study(*, wire: Encoding = "float32", **strategy: Any) -> Study:
    training = {"rounds": 4, "sampling_rate": 0.25, "learning_rate": 1.0}
    return Study.model_validate(
        {
            "study": {"name": "trial", "seed": 7},
            "base": {"model": "tiny"},
            "lora": {},
            "objective": {"name": "causal_lm"},
            "training": training,
            "clipping": {},
            "privacy": {"noise_multiplier": 1.5, "delta": 1e-5},
            "strategy": strategy,
            "wire": {"update": wire, "adapter": wire},
            "evaluation": {
                "path": Path("/secret/coordinator/path/held-out.jsonl"),
                "columns": {"prompt": "p", "completion": "c"},
                "every": 2,
            },
        }
    )


def update_of(name: str) -> dict[str, np.ndarray]:
    """What the site of this name sends in its first round."""
    return decode(FakeSite(name, known=True).train("", 1, zeros(), "").delta, SHAPES)


class FakeEvaluator:
    lacking: tuple[str, ...] = ()

    def measure(self, adapter: dict[str, np.ndarray] | None) -> dict[str, float]:
        return {"loss": 9.0 if adapter is None else float(sum(a.sum() for a in adapter.values()))}

    def follow(self, adapter: dict[str, np.ndarray] | None) -> dict[str, float]:
        return self.measure(adapter)

    def __len__(self) -> int:
        return 10

    def gain(self, adapter: dict[str, np.ndarray], start: Any = None) -> dict[str, Any]:
        return {"records": 12, "change": [-1.0, 1.0]}


@dataclass
class Bowl:
    """Its loss is least where every number of the adapter is `bottom`."""

    bottom: float = 0.25
    measured: int = 0
    lacking: tuple[str, ...] = ()

    def measure(self, adapter: dict[str, np.ndarray] | None) -> dict[str, float]:
        self.measured += 1
        adapter = adapter or zeros()
        return {"loss": float(sum(((a - self.bottom) ** 2).sum() for a in adapter.values()))}

    def follow(self, adapter: dict[str, np.ndarray] | None) -> dict[str, float]:
        return self.measure(adapter)

    gain, __len__ = FakeEvaluator.gain, FakeEvaluator.__len__


def save(study: Study, adapter: Any, frozen: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    np.savez(folder / "adapter.npz", **adapter)


def make_parts(**changes: Any) -> Dependencies:
    parts: dict[str, Any] = {
        "start": lambda study: SimpleNamespace(
            study=study, adapter=zeros(), frozen={}, strategy={}
        ),
        "evaluator": lambda study, frozen: FakeEvaluator(),
        "epsilon": lambda events, delta: sum(q * n / s for s, q, n, _ in events),
        "accountant": lambda: "fake",
        "engine": lambda study: "one-pass",
        "licence": lambda study: "apache-2.0",
        "save": save,
        "report": lambda out, body: None,
        "settings": Settings(patience=0.0, pause=0.0),
    }
    names = {field.name for field in fields(Settings)}
    how = {name: changes.pop(name) for name in names & set(changes)}
    made = Dependencies(**(parts | changes))
    return replace(made, settings=replace(made.settings, **how))


def grid_of(names: Iterable[str], kind: type[InProcessGrid] = InProcessGrid) -> InProcessGrid:
    """Nodes whose site files are names alone."""
    return kind([Path(name) for name in names], fedtune.launch.in_one_process.app, str)


@dataclass
class Trial:
    """Sites, and everything that `run` needs to go over them."""

    folder: Path
    sites: list[FakeSite]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def grid(self) -> InProcessGrid:
        return grid_of(site.name for site in self.sites)

    def run(self, study: Study | None = None, *, grid: Any = None, **options: Any) -> Any:
        options.setdefault("parts", make_parts())
        options.setdefault("on_event", lambda kind, data: self.events.append((kind, data)))
        out = options.pop("out", self.folder / "out")
        study = study or make_study(min_sites=2)
        return rounds.run(grid or self.grid(), study, out, **options)

    def adapter(self, out: str = "out") -> dict[str, np.ndarray]:
        with np.load(self.folder / out / "adapter" / "adapter.npz") as arrays:
            return dict(arrays)


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trial]:
    """trial(FakeSite(...), ...): the sites that launch.in_one_process then finds by name."""

    def make(*sites: FakeSite, folder: str = "trial") -> Trial:
        by_name = {site.name: site for site in sites}
        monkeypatch.setattr(fedtune.core.vault.answers, "worker", lambda path: by_name[path])
        home = tmp_path / folder
        home.mkdir()
        return Trial(home, list(sites))

    return make
