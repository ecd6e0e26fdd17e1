"""A thousand planted identifiers: none in anything that a run writes, sends, logs or shows."""

from __future__ import annotations

import base64
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fedtune.core.models import prefix_store
from fedtune.core.models.prefix_store import PREFIX_STORE, HiddenStates
from tests.depth import long_but
from tests.guarantee.search import Finder, forms
from tests.guarantee.world import ANSWERS, NAMES, Row, lay_out, run
from tests.models.test_states import InTheClear
from tests.test_cli import run as command


def identifiers(count: int = 1000) -> list[str]:
    """Names and numbers that nothing else holds, by a fixed draw."""
    draw = random.Random(20)
    letters = "BCDFGHJKLMNPQRSTVWXZ"
    return [
        "".join(draw.choices(letters, k=6)) + f"-{draw.randrange(10**6):06d}" for _ in range(count)
    ]


PLANTED = identifiers()


def records(mine: list[str]) -> list[Row]:
    """Each identifier in one place: a patient's key, a note, an answer (of a pair both of them), or
    a rejected row."""
    rows: list[Row] = []
    for number, one in enumerate(mine):
        kind = number % 4
        key = one if kind == 0 else f"who-{number % 40}"
        note = f"seen by {one} on the ward" if kind == 1 else f"fever, day {number}"
        answer, worse = (one, f"not {one}") if kind == 2 else ("yes", "no")
        asked = note if kind < 3 else one * 4000
        rows.append({"who": key, "q": asked, "a": answer, "b": worse})
    return rows


@pytest.fixture(scope="module")
def finder(tiny_base: Path) -> Finder:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    needles = []
    for text in PLANTED:
        ids = [tokenizer.encode(lead + text, add_special_tokens=False) for lead in ("", " ")]
        # The first and the last token may have merged with what stood beside them.
        inner = {tuple(each[1:-1]) for each in ids}
        needles += [pair for pair in forms(text, sorted(inner)) if len(pair[1]) >= 8]
    return Finder(needles)


def test_the_finder_finds_every_form(finder: Finder, tiny_base: Path) -> None:
    """The twin: in whatever form an identifier slips out, it is found."""
    one = PLANTED[500]
    ids = AutoTokenizer.from_pretrained(tiny_base).encode(f"seen by {one} again")
    leaks = [
        f"record: {one}".encode(),
        json.dumps({"x": one}).encode(),
        json.dumps({"x": "".join(f"\\u{ord(c):04x}" for c in one)}).replace("\\\\", "\\").encode(),
        one.encode("utf-16-le"),
        one.encode().hex().encode(),
        np.array(ids, dtype="<i4").tobytes(),
        b"..." + np.array(ids, dtype="<i8").tobytes(),
        json.dumps(ids).encode(),
        *(base64.b64encode(b"x" * n + b"padded by " + one.encode() + b"!!") for n in range(3)),
    ]
    for leak in leaks:
        assert finder.found(leak), leak
    assert not finder.found(b"nothing of the kind: " + bytes(range(256)) * 50)


@pytest.mark.long
@pytest.mark.parametrize("objective", long_but(["dpo"], ANSWERS))
def test_no_identifier_is_in_anything_a_run_leaves_behind(
    objective: str,
    tmp_path: Path,
    tiny_base: Path,
    finder: Finder,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # thousands of lines about fonts
    logging.getLogger().addHandler(handler := logging.FileHandler(tmp_path / "debug.log"))
    half = len(PLANTED) // 2
    rows = records(PLANTED[:half]), records(PLANTED[half:])
    study = lay_out(tmp_path, tiny_base, *rows, objective=objective)
    try:
        grid = run(study)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    data = [tmp_path / f"{name}.jsonl" for name in NAMES]
    assert finder.in_folder(tmp_path) != {}  # the data files themselves, where nothing is skipped
    written = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    kinds = {path.name for path in written}
    assert {"ledger.db", "ledger.head", "steps.jsonl", "report.json", "debug.log"} <= kinds
    assert finder.in_folder(tmp_path, but=data) == {}
    assert [hit for body in grid.sent for hit in finder.found(body)] == []
    shown = "".join(capfd.readouterr()) + caplog.text
    assert finder.found(shown.encode()) == []


@pytest.mark.long
@pytest.mark.parametrize("sealed", [True, False])
def test_the_file_of_states_gives_nothing_away(
    tmp_path: Path,
    tiny_base: Path,
    finder: Finder,
    monkeypatch: pytest.MonkeyPatch,
    sealed: bool,
) -> None:
    """No memory for states, so all are in the file. The twin: a cipher that changes nothing."""
    if not sealed:
        monkeypatch.setattr(prefix_store, "AESGCM", InTheClear)
    raw: list[tuple[str, bytes]] = []
    honest = PREFIX_STORE.keep

    def keep(found: torch.Tensor, name: bytes, limit: int | None) -> HiddenStates:
        raw.extend(("states", position.numpy().tobytes()) for position in found)
        return honest(found, name, limit)

    monkeypatch.setattr(PREFIX_STORE, "keep", keep)
    study = lay_out(tmp_path, tiny_base, records(PLANTED[:100]), records(PLANTED[100:200]))
    for name in NAMES:
        site = tmp_path / f"site-{name}.toml"
        site.write_text(site.read_text().replace("[data]", "cache_memory = 0.0\n[data]"))
    run(study)
    assert PREFIX_STORE._file is not None and PREFIX_STORE.on_disk > 0
    body = Path(f"/proc/self/fd/{PREFIX_STORE._file.number}").read_bytes()
    assert len(body) >= PREFIX_STORE.on_disk
    assert finder.found(body) == []
    assert (Finder(raw).found(body) == []) == sealed


@pytest.mark.parametrize("spoil", ["a broken record", "no such column", "one patient"])
def test_no_identifier_is_in_an_error_or_a_traceback(
    tmp_path: Path,
    tiny_base: Path,
    finder: Finder,
    spoil: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The command's own words, with tracebacks switched on."""
    rows = records(PLANTED[:20])
    study = lay_out(tmp_path, tiny_base, rows)
    site = tmp_path / "site-north.toml"
    if spoil == "a broken record":
        text = json.dumps(rows[0])[:-3]
        (tmp_path / "north.jsonl").write_text(text + "\n")
    elif spoil == "no such column":
        site.write_text(site.read_text().replace('completion = "a"', 'completion = "z"'))
    else:
        (tmp_path / "north.jsonl").write_text(json.dumps({**rows[0], "q": PLANTED[1]}) + "\n")
    monkeypatch.setenv("FEDTUNE_DEBUG", "1")
    ended = command("simulate", study, "--out", tmp_path / "run")
    assert ended.exit_code == 2, ended.stderr[-500:]
    shown = (ended.stdout, ended.stderr, caplog.text, *capfd.readouterr())
    assert finder.found("".join(shown).encode()) == []
