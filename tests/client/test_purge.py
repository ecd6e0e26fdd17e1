"""After `fedtune purge`, nothing that a site kept of its studies is there, and the ledger is."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from fedtune.core.config import Columns, Site, SiteData, SiteTable, load_site, load_study
from fedtune.core.errors import InfrastructureError
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.processes import alone
from fedtune.core.registry import process_cache
from fedtune.core.vault.worker import SiteWorker
from fedtune.observe import observer
from fedtune.officer import purge as purger
from fedtune.officer.purge import KINDS, NEVER_DELETED, listing, purge
from fedtune.public.start import start
from tests.client.test_site import begun, make_site, notes, trains
from tests.guarantee.search import Finder, forms
from tests.guarantee.world import lay_out, patients
from tests.guarantee.world import run as run_study
from tests.test_cli import run

TEXT = "Ackroyd, seen on the third floor"
STATE, SITE = Path("state-north"), Path("site-north.toml")
BY_HAND = (  # what other processes leave, as it is called there
    "kept-plans/0123456789abcdef.request", "checked-site.json",
    "flower/supernode.log", "flower/app/x.fab", "ranks/config.toml", "rank-1.log", "log.jsonl.1",
    "runs/0123456789abcdef/ledger.db", "runs/0123456789abcdef/site.key", "runs.json", "sheet.json",
    "acceptance/2026-11-28T180000Z-0123abcd/figures.json",
    "acceptance/2026-11-28T180000Z-0123abcd/page.html",
    "personal/0123456789abcdef-0123456789abcdef.sealed",
    "studies/0123456789abcdef.json",
    "draws/0123456789abcdef01234567-1-1-0123456789abcdef01234567.bin",
    "asked/0123456789abcdef-0123456789ab.json",
    "outbox/0123456789abcdef-1-0123456789abcdef.bin.4194305.new", "ledger.head.4194305.new",
)  # fmt: skip


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A site after a study: its plan waited for a signature, and got it; the text is in its records
    and, so that a file which was forgotten is found, in each file that purge knows."""
    folder = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FEDTUNE_STRICT", "1")
        patch.setenv("FEDTUNE_CACHE", str(folder / "cache"))
        study = lay_out(
            folder, tiny_base, [{**row, "q": f"{TEXT}: {row['q']}"} for row in patients(12)]
        )
        SITE.write_text(SITE.read_text() + 'admission = "signed"\n')
        with observer("site", STATE) as seen, pytest.raises(Exception, match="nobody at the site"):
            seen("joined", {})
            run_study(study)
        Ledger(STATE).admit(start(load_study(study)).study.digest, "somebody")
        run_study(study)
        for name in BY_HAND:
            (STATE / name).parent.mkdir(parents=True, exist_ok=True)
            (STATE / name).touch()
        for path in listing(load_site(SITE)).files:
            with path.open("a") as file:
                file.write(TEXT)
        process_cache.clear("workers")
    return folder


@pytest.fixture
def site(tmp_path: Path, studied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and of its cache, to purge."""
    shutil.copytree(studied, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return SITE


def found_in(folder: Path) -> set[str]:
    finder = Finder(forms(TEXT))
    caches = [finder.in_folder(Path(os.environ["FEDTUNE_CACHE"]))] if folder == Path() else []
    data = [folder / "north.jsonl"]
    return set(finder.in_folder(folder, but=data)).union(*caches)


def test_nothing_is_left_of_a_study_but_what_the_guarantee_needs(site: Path) -> None:
    known = listing(load_site(site))
    assert set(known.deletable) == set(KINDS) and known.unknown == []
    assert len(found_in(STATE)) == len(known.files) >= len(BY_HAND) + 5
    before = Ledger(STATE)
    head, charges = before.head, before.charges("records")
    seen = run("purge", site, "--yes")
    assert seen.exit_code == 0, seen.output
    assert found_in(Path()) == set()
    left = {path.name for path in STATE.rglob("*") if path.is_file()}
    assert left == {
        "ledger.db",
        "ledger.head",
        "site.key",
        "salt",
        "steps.jsonl",
        "status.lock",
        "audit.jsonl",
        "audit.lock",
    } | (left & {"ledger.receipt"})
    after = Ledger(STATE)
    after.verify()
    assert after.head == head and after.charges("records") == charges
    assert "nothing to delete" in run("purge", site).output


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_forgotten_is_found(
    site: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the search above."""
    monkeypatch.setattr(purger, "KINDS", {k: v for k, v in KINDS.items() if k != kind})
    assert run("purge", site, "--yes").exit_code == 0
    assert found_in(Path())


def test_a_round_asked_for_again_after_a_purge_is_paid_again(
    tmp_path: Path, tiny_base: Path
) -> None:
    notes(tmp_path)
    at = SiteWorker(make_site(tmp_path, patient="who"))
    made = begun(tiny_base)
    at.prepare(made.study, made.frozen)
    trains(at, made, 1)
    trains(at, made, 1)
    assert len(at.ledger.charges("records")) == 1
    purge(listing(at.site))
    trains(at, made, 1)
    assert len(at.ledger.charges("records")) == 2


def test_it_lists_first_and_deletes_nothing_unasked(site: Path) -> None:
    before = sorted(STATE.rglob("*"))
    seen = run("purge", site)
    assert seen.exit_code == 2 and "nothing was deleted" in seen.stderr, seen.output
    for kind in KINDS:
        assert kind in seen.stdout
    assert sorted(STATE.rglob("*")) == before


def test_not_while_a_client_runs(site: Path) -> None:
    before = listing(load_site(site)).files
    with alone(STATE / "flower", "fedtune client"):  # as join() holds it
        seen = run("purge", site, "--yes")
    assert seen.exit_code == 4 and f"another fedtune client (process {os.getpid()})" in seen.stderr
    assert listing(load_site(site)).files == before
    with alone(STATE / "ranks", "a vault"):  # the lock above is where a courier may delete it
        assert run("purge", site, "--yes").exit_code == 4
    assert listing(load_site(site)).files == before
    assert run("purge", site, "--yes").exit_code == 0


@pytest.mark.parametrize("asked", ["inventory", "digest"])
def test_of_one_study_alone(site: Path, asked: str) -> None:
    first = {path.name for path in (STATE / "outbox").glob("*.bin")}
    study = Path("study.toml")
    study.write_text(study.read_text().replace('name = "inventory"', 'name = "second"'))
    SITE.write_text(SITE.read_text().replace('admission = "signed"', "max_epsilon = 40.0"))
    digest = Ledger(STATE).spending()[0].charge.study
    Path("run").rename("run-1")
    process_cache.clear("workers")
    run_study(study)
    both = {path.name for path in (STATE / "outbox").glob("*.bin")}
    assert first < both
    name = asked if asked == "inventory" else digest[:20]
    seen = run("purge", site, "--study", name, "--yes")
    assert seen.exit_code == 0 and digest in seen.output, seen.output
    assert {path.name for path in (STATE / "outbox").glob("*.bin")} == both - first
    assert not (STATE / "plans").exists() and (STATE / "log.jsonl").exists()
    other = run("purge", site, "--study", "third")
    assert other.exit_code == 2 and "no study 'third' here" in other.stderr


def test_what_is_not_fedtunes_is_named_and_left(site: Path) -> None:
    assert run("ledger", site, "--backup", STATE / "copy").exit_code == 0
    (STATE / "notes.txt").write_text("mine")
    (STATE / "link.log").symlink_to("notes.txt")
    seen = run("purge", site, "--yes")
    words = "".join(seen.output.split())
    for name in ("copy", "notes.txt", "link.log"):
        assert f"leftasitis:{STATE.resolve() / name}" in words, seen.output
        assert (STATE / name).exists()
    assert (STATE / "copy" / "ledger.db").exists()


def test_kept_is_never_a_kind() -> None:
    state = ("ledger.db", "ledger.db-journal", "ledger.receipt", "ledger.new", "ledger.head.lost-1")
    for name in (*state, "site.key", "salt", "steps.jsonl", "keys/tls.key", "keys.old-1/node.key"):
        assert purger._kind(name) == "", name
    assert NEVER_DELETED and purger._kind("anything") is None


def test_a_link_in_a_folders_place_deletes_nothing_elsewhere(tmp_path: Path) -> None:
    """Which the half of a client on the network may put there meanwhile. Twin: a folder's files are
    deleted."""
    state = tmp_path / "state"
    inside = state / "flower" / "d"
    inside.mkdir(parents=True)
    Ledger(state)
    (inside / "site.key").touch()
    columns = Columns(text="t")
    site = Site(
        site=SiteTable(name="a", declared_size=20, state=state),
        data=SiteData(path=tmp_path / "x.jsonl", columns=columns),
    )
    known = listing(site)
    assert inside / "site.key" in known.files
    inside.rename(state / "flower" / "e")
    inside.symlink_to("..")
    with suppress(InfrastructureError):
        purge(known)
    assert (state / "site.key").exists()
    inside.unlink()
    (state / "flower" / "e").rename(inside)
    purge(known)
    assert not inside.exists() and (state / "site.key").exists()
