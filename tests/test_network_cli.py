"""enroll, admit and revoke, as they are typed."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path

import pytest

from fedtune.core.config import load_study
from fedtune.core.errors import ConfigError
from fedtune.core.processes import alone
from fedtune.evidence import fingerprints
from fedtune.flower import enrol
from fedtune.launch import coordinator
from tests.flower import kit
from tests.flower.test_tls import STUDY
from tests.test_cli import run

FINGERPRINT = re.compile(r"fingerprint\s+((?:[0-9a-f]{4} ?){5})\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "study.toml").touch()  # this is the coordinator's folder
    return kit.site_file(tmp_path / "a", "a", 1)


def asked(site: Path, *options: str) -> str:
    """Run enroll; the fingerprint that it says."""
    said = run("enroll", site, *options)
    assert said.exit_code == 0, said.output
    found = FINGERPRINT.search(said.output)
    assert found and "PRIVATE" not in said.output
    return found[1]


def test_a_site_is_enrolled_admitted_revoked_and_comes_back_with_new_keys(site: Path) -> None:
    heard = asked(site)
    request = site.parent / "a.request"
    at = ("--address", "hub.example:8443")
    done = run("admit", request, "--fingerprint", heard, *at)
    assert done.exit_code == 0, done.output
    answer = json.loads(Path("a.answer").read_text())
    assert answer["address"] == "hub.example:8443"
    assert fingerprints.of_consortium(answer["ca"], answer["coordinator"]) in done.output
    assert asked(site) == heard  # the same keys
    assert run("revoke", "a").exit_code == 0
    assert not enrol.registry(Path("coordinator"))
    again = run("admit", request, "--fingerprint", heard, *at)
    assert again.exit_code == 3 and "was revoked" in again.stderr
    fresh = asked(site, "--new-keys")
    assert fresh != heard and (site.parent / "state" / "keys.old-1" / "node.key").is_file()
    assert run("admit", request, "--fingerprint", fresh, *at).exit_code == 0


def test_neither_a_request_nor_an_answer_replaces_anything_else(site: Path) -> None:
    """Nor are keys put aside, or a site admitted, before it is refused. Twin: an earlier request
    and an earlier answer are replaced."""
    here, heard = site.parent, asked(site)
    kept = {"study.toml": here.parent / "study.toml", "key": here / "state" / "site.key"}
    (here / "link").symlink_to("a.request")
    os.mkfifo(here / "pipe")
    taken = [*kept.values(), here / "link", here / "pipe", here, site]
    keys = (here / "state" / "keys" / "node.key").read_bytes()
    before = {path: path.read_bytes() for path in (*kept.values(), site)}
    admit = ("admit", here / "a.request", "--fingerprint", heard, "--address", "hub.example:8443")
    for out in (*taken, here / "a.request"):
        done = run(*admit, "--out", out)
        assert done.exit_code == 2 and "exists, but holds no answer" in done.stderr, done.stderr
    assert not Path("coordinator").exists()
    assert run(*admit).exit_code == 0
    for out in (*taken, Path("a.answer")):
        done = run("enroll", site, "--new-keys", "--out", out)
        assert done.exit_code == 2 and "exists, but holds no request" in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert (here / "state" / "keys" / "node.key").read_bytes() == keys
    assert (here / "pipe").is_fifo() and (here / "link").is_symlink()
    assert asked(site) == heard and run(*admit).exit_code == 0


def test_no_second_home_is_made_by_being_in_another_folder(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site admitted into another folder's new CA would be refused by the server for good."""
    heard, elsewhere = asked(site), site.parent / "elsewhere"
    elsewhere.mkdir()
    admit = ("admit", site.parent / "a.request", "--fingerprint", heard, "--address", "x:1")
    monkeypatch.chdir(elsewhere)
    for words in (admit, ("revoke", "a")):
        done = run(*words)
        assert done.exit_code == 2 and "no coordinator's home here" in done.stderr
    assert not list(elsewhere.iterdir())
    assert run(*admit, "--home", site.parent / "coordinator").exit_code == 0
    assert run("revoke", "a", "--home", site.parent / "coordinator").exit_code == 0


def test_the_servers_home_and_run_are_beside_its_study_wherever_it_is_started(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, elsewhere, homes = site.parent.parent / "study.toml", site.parent / "x", list[Path]()
    runs = list[Path]()
    study.write_text(STUDY)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def serve(_: Path, out: Path, *, home: Path, **__: object) -> None:
        homes.append(home)
        runs.append(out)
        raise ConfigError("enough")

    monkeypatch.setattr(coordinator, "serve", serve)
    assert run("server", study).exit_code == run("server", study, "--home", "h").exit_code == 2
    assert run("server", study, "--out", "r").exit_code == 2
    beside = study.parent / "coordinator"
    assert homes == [beside, Path("h"), beside]
    own = study.parent / "runs" / load_study(study).study.name
    assert [each.resolve() for each in runs] == [own, own, elsewhere / "r"]


def test_a_fingerprint_that_differs_is_refused(site: Path) -> None:
    heard = asked(site)
    other = ("0" if heard[0] != "0" else "1") + heard[1:]
    done = run("admit", site.parent / "a.request", "--fingerprint", other, "--address", "x:1")
    assert done.exit_code == 3 and "somebody may have replaced the file" in done.stderr
    assert not Path("coordinator").exists() and not Path("a.answer").exists()


def test_several_are_admitted_at_once_each_by_its_fingerprint(site: Path) -> None:
    """One that nobody heard keeps all of them out."""
    heard = {"a": asked(site)}
    for name in ("b", "c"):
        heard[name] = asked(kit.site_file(site.parent.parent / name, name, 1))
    files = [site.parent.parent / name / f"{name}.request" for name in heard]
    words = ("admit", *files, "--address", "x:1")
    given = [word for one in reversed(heard.values()) for word in ("--fingerprint", one)]
    few = run(*words, *given[2:])
    assert few.exit_code == 2 and "2 fingerprints for 3 requests" in few.stderr
    wrong = run(*words, *given[:5], "0000 0000 0000 0000 0000")
    assert wrong.exit_code == 3 and "a's request" in wrong.stderr
    last = run(*words, "--fingerprint", "0000 0000 0000 0000 0000", *given[2:])
    assert last.exit_code == 3 and "c's request" in last.stderr
    twice = run(*words, *given[:4], *given[2:4])  # one of them heard twice is not the third
    assert twice.exit_code == 3
    named = run(*words, *given, "--out", "x.answer")
    assert named.exit_code == 2 and "--out" in named.stderr
    assert not Path("coordinator").exists() and not list(Path().glob("*.answer"))
    done = run(*words, *given)
    assert done.exit_code == 0, done.output
    assert set(enrol.registry(Path("coordinator"))) == {"a", "b", "c"}
    assert {p.name for p in Path().glob("*.answer")} == {"a.answer", "b.answer", "c.answer"}
    assert done.output.count("consortium   ") == 1


def test_admit_waits_for_the_plan_that_a_running_server_makes(site: Path) -> None:
    """Twin: where no server runs, it does not wait, and says what to do."""
    heard, home = asked(site), Path("coordinator")
    words = ("admit", site.parent / "a.request", "--fingerprint", heard, "--address", "x:1")
    alone_here = run(*words)
    assert alone_here.exit_code == 0 and "no plan  the answers bring none" in alone_here.output
    assert "no `fedtune server` runs here" in alone_here.output
    made = json.dumps({"study": "{}", "signature": "00"})
    with alone(home / "flower", "fedtune server"):
        timer = threading.Timer(1.0, (home / enrol.PLAN).write_text, [made])
        timer.start()
        done = run(*words)
        timer.join()
    assert done.exit_code == 0 and "waiting  for the plan" in done.output, done.output
    assert json.loads(Path("a.answer").read_text())["plan"] == "{}"


def test_nobody_is_admitted_without_a_person(site: Path) -> None:
    heard = asked(site)
    done = run("admit", site.parent / "a.request", "--address", "x:1")
    assert done.exit_code == 2 and heard in done.output and "nobody compared" in done.stderr
    assert not Path("coordinator").exists()


def test_the_servers_address_is_used_and_asked_for_where_it_is_not_known(site: Path) -> None:
    heard = asked(site)
    words = ("admit", site.parent / "a.request", "--fingerprint", heard)
    done = run(*words)
    assert done.exit_code == 2 and "--address" in done.stderr
    Path("coordinator").mkdir(mode=0o700)
    Path("coordinator/address").write_text("hub.example:9000")
    assert run(*words).exit_code == 0
    assert json.loads(Path("a.answer").read_text())["address"] == "hub.example:9000"


def test_revoking_nobody_names_who_there_is(site: Path) -> None:
    done = run("revoke", "b")
    assert done.exit_code == 2 and "no site named b is admitted" in done.stderr


def test_the_help_says_how_keys_are_rotated() -> None:
    said = " ".join(run("enroll", "--help").output.split())
    assert "rotation" in said and "--new-keys" in said and "revokes the site" in said


def test_each_fingerprint_says_whose_it_is_and_what_to_do_with_it(site: Path) -> None:
    enrolled = run("enroll", site).output
    heard = FINGERPRINT.findall(enrolled)[0]
    request = site.parent / "a.request"
    shown = run("admit", request, "--address", "x:1").output
    admitted = run("admit", request, "--fingerprint", heard, "--address", "x:1").output
    answer = json.loads(Path("a.answer").read_text())
    consortium = fingerprints.of_consortium(answer["ca"], answer["coordinator"])

    def said_below(text: str, line: str) -> str:
        lines = text.splitlines()
        return lines[lines.index(line) + 1].strip()

    ours, phone = "this is OURS: read it out to", "over the phone"
    assert said_below(enrolled, f"fingerprint   {heard}") == f"{ours} the coordinator {phone}"
    theirs = "this is THEIRS, as the file has it: compare it with what a reads out to you"
    assert said_below(shown, f"fingerprint   {heard}") == theirs
    assert said_below(admitted, f"consortium   {consortium}") == f"{ours} each site {phone}"
    assert enrolled.index("only for a plan with [secure_aggregation]") < enrolled.index("to peers")
