"""Sites for the model-based test: worker and ledger as shipped, their gradients made up."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from fedtune.core.config import Study
from fedtune.core.secagg.statement import parse
from fedtune.core.vault.prepared import Prepared, Update
from fedtune.core.vault.worker import SiteWorker

NAMES = ("a", "b", "c", "d", "s")
PINNED = NAMES[:4]  # pin each other; s is enrolled by the coordinator and pinned by nobody
LEAST, COLLUDING, SIGMA, NORM, RATE = 3, 1, 2.0, 0.5, 1.0
SIZES = {name: 10 + n for n, name in enumerate(NAMES)}
DIMENSION, ROUNDS = 8, 3
DRAW_LIES = ("another draw", "another size", "another name")  # of a statement
READY_LIES = (*DRAW_LIES, "another noise", "a key of low order")
SITE = """
[site]
name = "{name}"
declared_size = {size}
state = "{name}"
[data]
path = "records.jsonl"
columns = {{ text = "q", label = "a" }}
[policy]
bases = "any"
peers = {peers}
max_delta = 1e-3
max_epsilon = 1e9
max_epsilon_per_study = 1e9
max_fallback_epsilon = 1e9
"""


def study(**strategy: Any) -> Study:
    return Study.model_validate(
        {
            "study": {"name": "shared"},
            "base": {"model": "tiny"},
            "objective": {"name": "classify", "labels": ("y", "n")},
            "training": {"rounds": ROUNDS, "sampling_rate": 1.0, "learning_rate": RATE},
            "clipping": {"max_grad_norm": NORM},
            "privacy": {"noise_multiplier": SIGMA, "delta": 1e-3},
            "strategy": {"min_sites": LEAST, "round_timeout": 1} | strategy,
            "wire": {"update": "float32", "adapter": "float32"},
            "secure_aggregation": {"colluding": COLLUDING},
        }
    )


class Stub:
    """A network of one tensor that learns nothing."""

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"u": torch.zeros(DIMENSION)}

    update_parameters = parameters

    def load_trainable(self, adapter: Any) -> None:
        assert {name: array.shape for name, array in adapter.items()} == {"u": (DIMENSION,)}

    def load_frozen(self, frozen: Any) -> None: ...


class UnitWorker(SiteWorker):
    """crash: where it dies next; lie: what it says in place of the truth, once."""

    crash = lie = ""

    def _prepare_model(self, study: Study, plan: Any, frozen: Any, coordinator: str) -> Prepared:
        self.ledger.declare(self.site.data.name, [], "h", [b"1", b"2"])
        return Prepared(study, Stub(), plan, frozen, coordinator, None)  # type: ignore[arg-type]

    def data_for(self, study: Study, network: Any, data: Any) -> Any:
        return SimpleNamespace(network=network, site=self)

    def who_remain(self, data: Any, read: Any) -> Any:
        return read

    def die(self, where: str) -> None:
        if self.crash == where:
            raise RuntimeError("crashed")


def lied(site: UnitWorker, what: str, told: Update) -> Update:
    """Replace what a site says, once."""
    kind, site.lie = site.lie, ""
    if what == "ready" and kind in READY_LIES:
        ready = parse(told.said["ready"])
        other = type(ready.draw)(**{**vars(ready.draw), "attempt": ready.draw.attempt + 1})
        changes: dict[str, dict[str, Any]] = {"another draw": {"draw": other}}
        changes |= {"another size": {"size": 1}, "a key of low order": {"masking": "00" * 32}}
        changes |= {"another noise": {"noise": ready.noise / 2}}
        changed = changes.get(kind, {"site": "b" if ready.site == "a" else "a"})
        lie = replace(ready, **changed).signed(site.key)
        return Update({}, told.events, {"ready": lie.text()})
    if what == "masked" and kind == "another set":
        return Update(told.delta, told.events, {"set": "a lie"})
    if what == "masked" and kind == "short words":
        short = {name: array[:-1] for name, array in told.delta.items()}
        return Update(short, told.events, {"set": "a lie"})
    if what == "masked" and kind == "garbled words":
        return Update({name: a[::-1] for name, a in told.delta.items()}, told.events, told.said)
    site.lie = kind
    return told
