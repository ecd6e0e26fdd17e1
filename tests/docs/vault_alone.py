"""Answer requests in this process as a site's vault does, and print what was said and loaded.

    python tests/docs/vault_alone.py FOLDER [MODULE]

FOLDER: of each study a folder with its plan, arrays, steps and site files, as test_boundary.py lays
them out; MODULE: imported beside the vaults. Imports nothing of fedtune but what stands here, so
that what is loaded is what a vault loads."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors.numpy import load_file

from fedtune.core.config import Site, load_site, study_from_json
from fedtune.core.ledger.files import DATABASE
from fedtune.core.registry import process_cache
from fedtune.core.secagg.statement import parse, set_text
from fedtune.core.vault.process import serve
from fedtune.core.wire.arrays import bodies, pack_arrays
from fedtune.core.wire.codec import encode
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.requests import Answer, Kind, Request, receive_answer, send
from fedtune.core.wire.seal import digest_beside, order

NO_SELF_TEST = "no-self-test"  # a file of a study whose sites skip theirs
SUFFIX: dict[Kind, str] = {"ready": ":ready", "masked": ":masked", "evaluate": ":evaluation"}


class Study:
    """The vaults of one study, and the coordinator that asks them."""

    def __init__(self, folder: Path, open_: ExitStack) -> None:
        self.files = sorted(folder.glob("site-*.toml"))
        self.plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        self.study = study_from_json(self.plan["study"])
        self.frozen = load_file(folder / "frozen.safetensors")
        self.adapter = load_file(folder / "adapter.safetensors")
        self._key = SigningKey.at(folder.parent / "coordinator.key")
        self._couriers = [_vault(file, open_) for file in self.files]
        self._keys: list[str] = []
        self._statements: list[str] = []

    def _ask(self, request: Request) -> Iterator[Answer]:
        for courier in self._couriers:
            send(courier, request)
            yield receive_answer(courier)

    def _order(self, kind: Kind, **table: str) -> Iterator[Answer]:
        """Have every site do its work of round 1."""
        digest = self.study.digest + SUFFIX.get(kind, "")
        attempt = 1 if table else 0
        encoded = {} if kind == "masked" else encode(self.adapter, self.study.wire.adapter)
        arrays = pack_arrays(encoded)
        beside = digest_beside(bodies(arrays), table)
        signed = order(self._key, digest, 1, "0" * 32, "", attempt, beside=beside)
        tables: dict[str, Mapping[str, Any]] = {"order": signed}
        tables |= {"set": table} if table else {}
        return self._ask(Request(kind, tables, arrays))

    def prepare(self) -> Iterator[str]:
        for answer in self._ask(Request("prepare", {"plan": self.plan}, pack_arrays(self.frozen))):
            self._keys.append(str(answer.fields.get("key")))
            yield _said(answer)

    def train(self) -> Iterator[str]:
        yield from map(_said, self._order("train"))

    def evaluate(self) -> Iterator[str]:
        yield from map(_said, self._order("evaluate"))

    def ready(self) -> Iterator[str]:
        for answer in self._order("ready", asked=json.dumps(self._keys)):
            self._statements.append(str(answer.fields.get("ready")))
            yield _said(answer)

    def masked(self) -> Iterator[str]:
        statements = set_text([parse(text) for text in self._statements])
        yield from map(_said, self._order("masked", statements=statements))

    def restart(self) -> Iterator[str]:
        process_cache.clear("workers")
        yield "restarted"

    def lose_records(self) -> Iterator[str]:
        for site in self._sites():
            site.data.path.unlink()
            yield "lost"

    def break_ledger(self) -> Iterator[str]:
        for site in self._sites():
            (site.site.state / DATABASE).write_bytes(b"no ledger")
            yield "broken"

    def _sites(self) -> list[Site]:
        return [load_site(file) for file in self.files]


def _vault(file: Path, open_: ExitStack) -> Connection:
    """Start a site's vault in a thread; return the courier's end of its socket."""
    courier, vault = Pipe()
    thread = Thread(target=serve, args=(file, vault, lambda event, facts: None, 1, {}))
    open_.callback(thread.join)
    open_.callback(courier.close)
    thread.start()
    return courier


def _said(answer: Answer) -> str:
    return f"{answer.status}: {answer.fields['reason']}"


def live(folder: Path) -> list[str]:
    """Do what steps.json says, and return what was said of each step at each site."""
    with ExitStack() as open_:
        if (folder / NO_SELF_TEST).exists():
            open_.enter_context(_without_self_test())
        study, said = Study(folder, open_), list[str]()
        for name in json.loads((folder / "steps.json").read_text(encoding="utf-8")):
            step: Callable[[], Iterator[str]] = getattr(study, name)
            said += step()
        return said


@contextmanager
def _without_self_test() -> Iterator[None]:
    from fedtune.core.vault import worker

    honest = worker.self_test
    worker.self_test = lambda *_: None
    try:
        yield
    finally:
        worker.self_test = honest


if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
    outcomes = {folder.name: live(folder) for folder in folders}
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "fedtune")
    others = sorted({name.partition(".")[0] for name in sys.modules} - {"fedtune"})
    print(json.dumps({"said": outcomes, "loaded": loaded, "others": others}))
