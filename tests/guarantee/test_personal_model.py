"""The bytes of a site's personal model: in its sealed file, encrypted, and nowhere else."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from starlette.testclient import TestClient

import fedtune
import fedtune.core.vault.worker
from fedtune.core.config import Columns, load_site
from fedtune.core.models.lora import Arrays
from fedtune.dashboard.kinds import page_of
from fedtune.dashboard.server import app_of
from fedtune.derive.settings import LabelSettings
from fedtune.evidence.personal import MARK
from fedtune.officer.personalise import personalise as personalising
from fedtune.officer.personalise.fit import Grid
from fedtune.runs.personal import open_personal
from fedtune.runs.run import Run
from tests.cli_kit import run as command
from tests.depth import long_but
from tests.guarantee.search import Finder
from tests.guarantee.world import lay_out, patients, run

PART = 16  # bytes of the arrays by which they are found
SITE = Path("site-north.toml")


def parts(arrays: Arrays, released: Arrays) -> Iterator[tuple[str, bytes]]:
    """Parts of the arrays' bytes, and of what they add to the released ones: as numbers of three
    sizes, as hexadecimal text, and as JSON."""
    for name, array in arrays.items():
        change = array - released[name]
        for what, values in (("array", array), ("change", change)):
            for kind in ("<f4", "<f8", "<f2"):
                body = values.astype(kind).tobytes()
                for at in range(0, len(body) - PART + 1, PART):
                    if any(part := body[at : at + PART]):
                        yield f"{what} {kind}", part
                        yield f"{what} {kind}, hex", part.hex().encode()
            for number in values.ravel()[np.abs(values.ravel()) > 1e-4].tolist():
                yield f"{what}, JSON", json.dumps(number).encode()


def shown(path: Path) -> str:
    browser = TestClient(app_of(page_of(path), "t"), base_url="http://127.0.0.1")
    browser.get("/?token=t")
    return browser.get("/").text + browser.get("/live").text


class World:
    """A finished study of two hospitals, at one of which its model is personalised; and, after
    that, everything that the hospitals and their coordinator then do with it."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.study = lay_out(folder, base, patients(14))
        text = self.study.read_text().replace("rounds = 3", "rounds = 1")
        self.study.write_text(text + '[wire]\nupdate = "float32"\n')
        run(self.study)
        Path("run").rename("first")
        self.site = load_site(SITE)
        self.told: list[str] = []

    def personalise(self) -> Finder:
        self.told.append(command("personalise", "first", "--site", SITE).output)
        model = open_personal(Run("first"), self.site)
        return Finder(parts(model._arrays, Run("first").adapter()))

    def go_on(self) -> list[bytes]:
        """Use it, and do everything in which it must not be; returns what was sent."""
        asked = ("first", "--site", SITE)
        columns = ("--column", "prompt=q", "--column", "completion=a")
        self.told += [
            command("evaluate", *asked, "--data", "north.jsonl", *columns).output,
            command("generate", *asked, "--prompt", "fever on day 3").output,
            command("status", "first").output,
            command("log", SITE).output,
            command("ledger", SITE).output,
        ]
        self.study.write_text(self.study.read_text().replace('"inventory"', '"second"'))
        grid = run(self.study)
        fedtune.release("first", "dossier")
        fedtune.export(Run("first"), "exported")
        fedtune.label(
            fedtune.DataFile(path=Path("north.jsonl"), columns=Columns(prompt="q", patient="who")),
            "preferences.jsonl",
            generator=Run("first"),
            settings=LabelSettings(new_tokens=2, max_length=64),
        )
        self.told += [shown(Path("first")), shown(Path("run")), shown(SITE)]
        return grid.sent


@pytest.fixture
def world(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path.parent / "cache"))
    monkeypatch.setattr(personalising, "ADAPTER_GRID", Grid((0.001,), (4,), (1.0,)))
    return World(tmp_path, tiny_base)


def logs_it(patch: pytest.MonkeyPatch, released: Arrays) -> None:
    honest = personalising.seal

    def seal(path: Path, arrays: Arrays, *rest: Any) -> None:
        honest(path, arrays, *rest)
        first = next(iter(arrays.values()))
        logging.getLogger("fedtune.site").warning("sealed %s", first.tobytes()[:256].hex())

    patch.setattr(personalising, "seal", seal)


def writes_it_into_the_run(patch: pytest.MonkeyPatch, released: Arrays) -> None:
    honest = personalising.seal

    def seal(path: Path, arrays: Arrays, *rest: Any) -> None:
        honest(path, arrays, *rest)
        save_file(arrays, "first/checkpoint/personal.safetensors")

    patch.setattr(personalising, "seal", seal)


def notes_it_in_the_state(patch: pytest.MonkeyPatch, released: Arrays) -> None:
    honest = personalising.seal

    def seal(path: Path, arrays: Arrays, *rest: Any) -> None:
        honest(path, arrays, *rest)
        numbers = [array.ravel()[:40].tolist() for array in arrays.values()]
        Path("state-north/figures.json").write_text(json.dumps(numbers))

    patch.setattr(personalising, "seal", seal)


def sends_it(patch: pytest.MonkeyPatch, released: Arrays) -> None:
    """A few of its numbers in a round's update: all of them are longer than any honest update."""
    kept: list[Arrays] = []
    honest, rounds = personalising.seal, fedtune.core.vault.worker.local_round

    def seal(path: Path, arrays: Arrays, *rest: Any) -> None:
        honest(path, arrays, *rest)
        kept.append({name: array - released[name] for name, array in arrays.items()})

    def local_round(*rest: Any, **more: Any) -> Arrays:
        update = rounds(*rest, **more)
        if kept:
            name = next(iter(update))
            update = {n: np.zeros_like(array) for n, array in update.items()}
            rows, own = update[name].reshape(-1, 4), kept[-1][name].reshape(-1, 4)
            smallest = np.argsort(np.abs(own).sum(axis=1))[:2]
            rows[smallest] = own[smallest]
        return update

    patch.setattr(personalising, "seal", seal)
    patch.setattr(fedtune.core.vault.worker, "local_round", local_round)


Leak = Callable[[pytest.MonkeyPatch, Arrays], None]
LEAKS: tuple[Leak | None, ...] = (
    None, logs_it, writes_it_into_the_run, notes_it_in_the_state, sends_it,
)  # fmt: skip


@pytest.mark.parametrize(
    "leak", long_but((None, sends_it), LEAKS), ids=lambda leak: getattr(leak, "__name__", "none")
)
def test_it_is_found_nowhere_outside_its_file(
    leak: Leak | None,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if leak is not None:
        leak(monkeypatch, Run("first").adapter())
    finder = world.personalise()
    sent = world.go_on()
    assert sent and any(MARK in text for text in world.told), "it was made, used and marked"
    said = "".join(world.told) + caplog.text
    where = [*finder.in_folder(tmp_path)]
    where += ["wire" for body in sent if finder.found(body)]
    where += ["screen"] if finder.found(said.encode()) else []
    assert bool(where) == (leak is not None), where
