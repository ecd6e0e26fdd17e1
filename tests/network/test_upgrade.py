"""Another release of fedtune at either side, in the middle of a study: a copied tree with another
version, and where it says so another protocol."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fedtune
from fedtune.core.errors import Refused
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire.protocol import PROTOCOL
from fedtune.flower.ports import free_port
from tests.network.kit import PRIVATE, SITES, Consortium, consortium, done, end, until

OTHER = "9.9.9"


def copied(folder: Path, edits: dict[str, dict[str, str]]) -> Path:
    """A copy of the packages with some texts replaced, by file."""
    here = Path(fedtune.__file__).parents[1]
    for name in ("fedtune", "server", "client"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(here / name, folder / name, ignore=skip)
    for file, changes in edits.items():
        text = (folder / file).read_text()
        for old, new in changes.items():
            assert text.count(old) == 1, file
            text = text.replace(old, new)
        (folder / file).write_text(text)
    return folder


def release(folder: Path, protocol: int = PROTOCOL) -> Path:
    """The packages as release OTHER would install them."""
    edits = {
        "fedtune/__init__.py": {f'"{fedtune.__version__}"': f'"{OTHER}"'},
        "fedtune/core/wire/protocol.py": {f"PROTOCOL = {PROTOCOL}\n": f"PROTOCOL = {protocol}\n"},
    }
    copied(folder, edits)
    assert done(folder, "--version", packages=folder).strip() == f"fedtune {OTHER}"
    return folder


def all_join(made: Consortium) -> None:
    until(made.listens, 120, made.told)
    for name in SITES:
        made.join(name)
        made.client(name)


@pytest.mark.long
def test_either_side_is_upgraded_in_the_middle_of_a_study(tmp_path: Path, tiny_base: Path) -> None:
    """After the first round a site, after the second the coordinator: three rounds, paid once."""
    rounds, other = 3, release(tmp_path / "other")
    with consortium(tmp_path / "run", "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, PRIVATE, rounds, round_timeout=60)
        server = made.server()
        all_join(made)
        east = made.running[-len(SITES)]
        until(lambda: made.rounds() >= 1 or server.poll() is not None, 300, made.told)
        assert server.poll() is None and end(east) == 0, made.told()
        made.packages["east"] = other
        made.client("east")
        until(lambda: made.rounds() >= 2 or server.poll() is not None, 300, made.told)
        assert server.poll() is None, made.told()
        end(server)
        made.packages["hub"] = other
        assert made.server("--resume").wait(300) == 0, made.told()
        for process in made.running:
            end(process)
        body = made.report()
        assert [entry["participants"] for entry in body["rounds"]] == rounds * [list(SITES)]
        for name in SITES:
            spent = made.spending(name)
            assert [each.charge.round for each in spent if each.released] == [1, 2, 3], name
            assert len(spent) <= rounds + (name == "east"), name  # stopped while it trained: again


@pytest.mark.long
@pytest.mark.parametrize("protocol", [PROTOCOL + 1, PROTOCOL - 1])
def test_a_coordinator_of_another_protocol_is_told_so_and_spends_nothing(
    tmp_path: Path, tiny_base: Path, protocol: int
) -> None:
    with consortium(tmp_path / "run", "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, PRIVATE, 3, round_timeout=60)
        made.packages["hub"] = release(tmp_path / "other", protocol)
        server = made.server()
        all_join(made)
        assert server.wait(400) == Refused.exit_code, made.told()
        for process in made.running:
            end(process)
        said = made.log("hub").read_text().replace("\n", " ")
        theirs = f"protocol {protocol} (fedtune {OTHER})"
        assert f"the coordinator speaks {theirs}, this site protocol {PROTOCOL} " in said
        for name in SITES:
            assert theirs in made.log(name).read_text().replace("\n", " "), made.told()
            ledger = Ledger(made.root / name / "state")
            assert ledger.head.seq == 0 and not made.noised(name)  # not even a dataset declared
