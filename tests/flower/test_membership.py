"""The coordinator's answer at a site: nothing in it counts before a person's fingerprint agrees."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fedtune.core.config import Study, load_site, load_study
from fedtune.core.errors import ConfigError, Refused
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire.keys import SigningKey
from fedtune.flower import certs, enrol, membership
from fedtune.flower.link import link
from fedtune.launch import coordinator
from fedtune.officer.review import read_plan
from fedtune.server import store
from fedtune.server.admission import plan_message
from tests.flower import kit
from tests.flower.test_tls import STUDY
from tests.test_cli import run


class Met:
    """A site that asked, and a coordinator with a plan: the answer's file beside site.toml."""

    def __init__(self, root: Path) -> None:
        self.home, self.site = root / "home", kit.site_file(root / "a", "a", 1)
        self.site.write_text(self.site.read_text().split("[coordinator]")[0])
        (root / "study.toml").write_text(STUDY)
        self.study = load_study(root / "study.toml")
        Ledger(self.site.parent / "state")
        self.request, self.keys = kit.ask(self.site), self.site.parent / "state" / "keys"
        certs.ca(self.home)
        self.file = self.site.parent / "a.answer"
        self.plan(self.study)

    def plan(self, study: Study, key: SigningKey | None = None) -> None:
        """The plan as the server keeps it, and a new answer with it."""
        signing = key or SigningKey.at(self.home / "signing.key")
        store.keep_plan(self.home / enrol.PLAN, plan_message(study, {}, signing))
        self.answer = enrol.admit(self.home, self.request, "127.0.0.1:1")
        self.write(self.answer)

    def write(self, answer: enrol.Answer) -> None:
        self.file.write_text(json.dumps(asdict(answer)))

    def join(self, fingerprint: str | None) -> enrol.Answer:
        return membership.join(self.file, self.keys, "a", fingerprint)


@pytest.fixture
def met(tmp_path: Path) -> Met:
    return Met(tmp_path)


def test_a_site_joins_with_the_fingerprint_that_it_heard_and_edits_no_file(met: Met) -> None:
    with pytest.raises(ConfigError, match="no answer from a coordinator yet"):
        link(load_site(met.site), met.site)
    before = met.site.read_bytes()
    met.join(met.answer.fingerprint.replace(" ", "").upper())
    met.file.unlink()
    found = link(load_site(met.site), met.site)
    assert (found.address, found.answer) == ("127.0.0.1:1", met.answer)
    assert met.site.read_bytes() == before
    assert (met.keys / membership.KEPT).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("heard", [None, "", "  "])
def test_nothing_is_kept_where_nobody_compared(met: Met, heard: str | None) -> None:
    with pytest.raises(ConfigError, match="nobody compared"):
        met.join(heard)
    assert not (met.keys / membership.KEPT).exists()


def test_another_consortiums_answer_is_refused_and_the_first_one_stays(met: Met) -> None:
    met.join(met.answer.fingerprint)
    kept = (met.keys / membership.KEPT).read_bytes()
    other = enrol.admit(_home(met.home.parent / "other"), met.request, "127.0.0.1:2")
    met.write(other)
    for heard in (None, met.answer.fingerprint):
        with pytest.raises(Refused, match="somebody may have replaced"):
            met.join(heard)
    assert (met.keys / membership.KEPT).read_bytes() == kept
    assert met.join(other.fingerprint).address == "127.0.0.1:2"


def _home(path: Path) -> Path:
    certs.ca(path)
    return path


def test_a_new_certificate_of_the_same_consortium_needs_no_second_call(met: Met) -> None:
    met.join(met.answer.fingerprint)
    met.plan(met.study)
    assert met.join(None).certificate == met.answer.certificate


def test_new_keys_want_a_new_answer(met: Met) -> None:
    met.join(met.answer.fingerprint)
    met.keys.rename(met.keys.with_name("keys.old-1"))
    kit.ask(met.site)
    with pytest.raises(ConfigError, match="another request"):
        met.join(met.answer.fingerprint)
    with pytest.raises(ConfigError, match="no answer from a coordinator yet"):
        link(load_site(met.site), met.site)


HOSTILE = {
    "a path as a name": ({"name": "../../etc/passwd"}, "another request"),
    "another site's": ({"name": "b"}, "another request"),
    "TOML in the address": ({"address": 'x:1"\n[policy]\nmax_epsilon = 1e9'}, "must be host:port"),
    "a control character": ({"address": "x\x1b[2J:1"}, "must be host:port"),
    "a CA of its own": ({"ca": "CA"}, "not signed by its CA"),
    "no certificate": ({"certificate": ""}, "not signed by its CA"),
    "a plan that is none": ({"plan": "{}"}, "its plan cannot be read"),
    "an unsigned plan": ({"signature": "00"}, "its plan cannot be read"),
    "a field more": ({"run": "rm"}, "not an answer"),
    "a number": ({"plan": 1}, "a value that is not a text"),
    "too large": ({"plan": "x" * membership.MAX_BYTES}, "larger than"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_answer_is_named_and_not_kept(met: Met, kind: str) -> None:
    changes, words = HOSTILE[kind]
    body = asdict(met.answer) | changes
    if kind == "a CA of its own":
        body["ca"] = certs.ca(met.home.parent / "x")[1].public_bytes(certs.PEM).decode()
    met.file.write_text(json.dumps(body))
    before = met.site.read_bytes()
    with pytest.raises((ConfigError, Refused), match=words) as caught:
        met.join(met.answer.fingerprint)
    assert "\n" not in str(caught.value)
    assert not (met.keys / membership.KEPT).exists() and met.site.read_bytes() == before
    met.write(met.answer)  # the twin: unchanged, it is taken
    assert met.join(met.answer.fingerprint)


def test_the_plan_of_an_answer_is_reviewed_before_the_site_joins(met: Met) -> None:
    site = load_site(met.site)
    assert read_plan(met.file, site).digest == met.study.digest
    shown = run("review", met.file, "--site", met.site)
    assert shown.exit_code == 0 and met.study.digest in shown.output, shown.output
    assert membership.read_reviewed_plan(met.answer) == met.study.digest
    met.write(replace(met.answer, plan="", signature=""))
    with pytest.raises(ConfigError, match="holds no plan") as found:
        read_plan(met.file, site)
    assert f"lie in {site.site.plan_file('').parent} until" in str(found.value)


def test_who_may_coordinate_is_judged_once_the_coordinator_is_known(met: Met) -> None:
    """By the answer that holds the plan, or with which the site joined; before, nothing is said
    against the plan, and the rule is named as not checked."""
    own, toml = met.site.read_text(), met.home.parent / "study.toml"

    def told(plan: Path, key: str) -> tuple[bool, bool]:
        """Whether the rule refuses the plan, and whether it is not checked; as `fedtune doctor`
        says too."""
        rules = f'bases = "any"\nallow_privacy_off = true\ncoordinators = ["{key}"]\n'
        met.site.write_text(f"{own}\n[policy]\n{rules}")
        shown = run("review", plan, "--site", met.site)
        said = " ".join(shown.output.split())
        refuses = f"policy.coordinators does not list {met.answer.coordinator!r}" in said
        assert shown.exit_code == 0 and ("This site refuses it" in said) == refuses, said
        unknown = "Not checked yet: policy.coordinators" in said
        checked = run("doctor", met.site, "--study", plan, "--json")
        findings = {one["name"]: one for one in json.loads(checked.stdout)["findings"]}
        assert findings["plan"]["good"] is not refuses
        assert ("policy.coordinators" in findings["plan"]["says"]) == (refuses or unknown)
        return refuses, unknown

    own_key, other = met.answer.coordinator, 64 * "0"
    assert told(toml, own_key) == told(toml, other) == (False, True)
    assert told(met.file, own_key) == (False, False)
    assert told(met.file, other) == (True, False)
    joining = run("client", met.site, "--answer", met.file, "--fingerprint", "0")
    assert f"does not list {own_key!r}" in " ".join(joining.output.split()), joining.output
    met.join(met.answer.fingerprint)
    assert told(toml, own_key) == (False, False)
    assert told(toml, other) == (True, False)


def test_a_plan_that_another_key_signed_is_not_reviewed(met: Met) -> None:
    other = plan_message(met.study, {}, SigningKey()).config_records["plan"]
    met.write(replace(met.answer, signature=str(other["signature"])))
    with pytest.raises(ConfigError, match="its plan cannot be read"):
        read_plan(met.file, load_site(met.site))


def test_an_answer_of_another_release_still_connects(met: Met) -> None:
    """A plan that was kept and that an upgraded site does not read any more is no plan to compare
    with; the link is as it was."""
    met.join(met.answer.fingerprint)
    kept = json.loads((met.keys / membership.KEPT).read_text())
    (met.keys / membership.KEPT).write_text(json.dumps(kept | {"plan": '{"newer": 1}'}))
    found = link(load_site(met.site), met.site)
    assert membership.read_reviewed_plan(found.answer) == ""


def test_the_plan_of_an_earlier_study_is_in_no_answer(met: Met, monkeypatch) -> None:
    def begun(*_: object, **__: object) -> None:
        raise ConfigError("enough")

    monkeypatch.setattr(coordinator, "prepare", lambda *_: None)
    monkeypatch.setattr(coordinator, "superlink", begun)
    with pytest.raises(ConfigError, match="enough"):
        coordinator.serve(met.study, met.home.parent / "run", home=met.home)
    assert not enrol.admit(met.home, met.request, "127.0.0.1:1").plan


# ------------------------------------------------------------------------------ as it is typed


def test_in_a_pipe_the_fingerprint_is_an_option(met: Met, monkeypatch) -> None:
    monkeypatch.setattr("fedtune.launch.site.join", lambda *_, **__: None)
    done = run("client", met.site, "--answer", met.file)
    assert done.exit_code == 2 and "nobody compared the consortium's" in done.stderr
    assert met.answer.fingerprint not in done.output  # it cannot be copied from there
    wrong = run("client", met.site, "--answer", met.file, "--fingerprint", "0000")
    assert wrong.exit_code == 3 and "may have replaced" in wrong.stderr
    assert run("client", met.site, "--fingerprint", "0000").exit_code == 2
    done = run("client", met.site, "--answer", met.file, "--fingerprint", met.answer.fingerprint)
    assert done.exit_code == 0 and "joined the consortium" in done.output, done.output
    assert "fedtune review" in done.output


@pytest.mark.parametrize("rule", ["standing", "reviewed", "signed"])
def test_joining_with_the_fingerprint_signs_the_plan_in_the_answer_and_no_other(
    met: Met, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """Twins: where the policy asks for --sign, or refuses the plan; where nobody gave the
    fingerprint, since a kept one is used again with another answer."""
    monkeypatch.setattr("fedtune.launch.site.join", lambda *_, **__: None)
    monkeypatch.setattr("fedtune.officer.before_joining.check_records", lambda *_: None)
    own, ledger = met.site.read_text(), Ledger(met.site.parent / "state")
    asked = ("client", met.site, "--answer", met.file, "--fingerprint", met.answer.fingerprint)

    def allow(line: str) -> None:
        met.site.write_text(own + f'\n[policy]\nbases = "any"\nadmission = "{rule}"\n{line}')

    allow("")
    refused = run(*asked)
    assert refused.exit_code == 0 and "this site refuses it" in refused.output, refused.output
    assert not ledger.admitted(met.study.digest)
    allow("allow_privacy_off = true\n")
    done = run(*asked)
    assert done.exit_code == 0 and "no ε can be stated" in done.output, done.output
    assert ledger.admitted(met.study.digest) == (rule != "signed")
    acts = audit_log.verify(ledger.folder, ledger.key.public).entries
    assert (acts[-1]["event"], acts[-1]["rule"]) == (
        ("join", "--answer") if rule == "signed" else ("sign", "--answer")
    )
    other = met.study.changed(study={"name": "another"})
    met.plan(other)
    again = run("client", met.site, "--answer", met.file)
    assert again.exit_code == 0 and not ledger.admitted(other.digest), again.output


def test_a_site_file_that_names_an_answer_is_the_only_one(met: Met) -> None:
    text = met.site.read_text()
    met.site.write_text(text + '[coordinator]\nanswer = "a.answer"\n')
    done = run("client", met.site, "--answer", met.file, "--fingerprint", "0")
    assert done.exit_code == 2 and "one of the two" in done.stderr
    met.site.write_text(text + '[coordinator]\nproxy = "http://proxy.example:3128"\n')
    met.join(met.answer.fingerprint)
    assert link(load_site(met.site), met.site).proxy == "http://proxy.example:3128"
    met.site.write_text(text + '[coordinator]\nfingerprint = "0000"\n')
    with pytest.raises(Refused, match="may have replaced"):
        link(load_site(met.site), met.site)
