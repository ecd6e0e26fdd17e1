"""Another protocol is refused at either end, by both numbers, before a record is read or a round is
charged; another release is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

import fedtune.core.vault.answers
import fedtune.launch.in_one_process
import fedtune.server.admission
from fedtune.core.errors import Refused
from fedtune.core.registry import process_cache
from fedtune.core.wire import protocol
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.protocol import PROTOCOL, OtherProtocol, check_peer, version_fields
from fedtune.core.wire.requests import FAILED
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.records import to_record
from fedtune.public.start import start
from fedtune.server.admission import plan_message
from tests.dp.conftest import study
from tests.server.fakes import FakeSite, make_study, trial

__all__ = ["trial"]
SITE = """
[site]
name = "a"
declared_size = 12
[data]
path = "notes.jsonl"
columns = { prompt = "note", completion = "answer" }
[policy]
bases = "any"
max_epsilon = 50.0
max_epsilon_per_study = 50.0
"""


@pytest.mark.parametrize("theirs", [PROTOCOL + 1, PROTOCOL - 1, -1, 10**9, None, "1", 1.0, True])
def test_any_other_number_is_another_protocol(theirs: Any) -> None:
    with pytest.raises(OtherProtocol, match=f"this site protocol {PROTOCOL} "):
        check_peer("the coordinator", {"protocol": theirs, "release": "9.9"}, "this site")


def test_what_a_peer_calls_itself_is_not_repeated_unless_it_is_a_release() -> None:
    said = {"protocol": PROTOCOL + 1, "release": "9.9\x1b[2J\n" + "x" * 500}
    with pytest.raises(OtherProtocol, match=r"\(fedtune unknown\)"):
        check_peer("the coordinator", said, "this site")


def test_another_release_of_the_same_protocol_is_no_other_peer() -> None:
    check_peer("the coordinator", {"protocol": PROTOCOL, "release": "9.9.9"}, "this site")


def asked(folder: Path, base: Path, **said: Any) -> ConfigRecord:
    """What a real site without a single record answers to a plan whose sender said `said`."""
    (folder / "site.toml").write_text(SITE)
    privacy = {"noise_multiplier": 4.0, "delta": 1e-3, "unit": "record"}
    base_table = {"model": str(base), "dtype": "float32"}
    begun = start(study(base=base_table, privacy=privacy))
    content = plan_message(begun.study, begun.frozen, SigningKey())
    plan = {key: value for key, value in content["plan"].items() if key not in version_fields()}
    grid = InProcessGrid([folder / "site.toml"], fedtune.launch.in_one_process.app)
    sent = RecordDict({"plan": ConfigRecord(plan | said), "frozen": to_record(begun.frozen)})
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([grid.create_message(sent, "query.prepare", node, "1")])
    return reply.content["admission"]


def untouched(folder: Path) -> bool:
    return not (folder / "state").exists()


@pytest.mark.parametrize("said", [{"protocol": PROTOCOL + 1, "release": "9.9"}, {}])
def test_a_site_refuses_before_it_looks_for_its_records(
    tmp_path: Path, tiny_base: Path, said: dict[str, Any]
) -> None:
    answer = asked(tmp_path, tiny_base, **said)
    assert answer["status"] == "refused" and answer["name"] == "a" and not answer["admitted"]
    number = f"protocol {PROTOCOL + 1} (fedtune 9.9)" if said else "protocol unknown"
    assert f"the coordinator speaks {number}" in str(answer["reason"])
    assert f"this site protocol {PROTOCOL}" in str(answer["reason"])
    assert untouched(tmp_path)


def test_without_the_check_the_site_looks_for_its_records(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin; and the same with another release, which is nobody's business."""
    answer = asked(tmp_path, tiny_base, protocol=PROTOCOL, release="9.9")
    assert (answer["status"], answer["reason"]) == ("failed", FAILED)
    process_cache.clear("workers")
    monkeypatch.setattr(fedtune.core.vault.answers, "check_peer", lambda *_: None)
    answer = asked(tmp_path, tiny_base, protocol=PROTOCOL + 1, release="9.9")
    assert answer["status"] != "refused" and not untouched(tmp_path)


def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site of the next protocol, which would take this one's plans."""
    said = {"protocol": PROTOCOL + 1, "release": "9.9"}
    monkeypatch.setattr(fedtune.core.vault.answers, "version_fields", lambda: said)


def test_a_coordinator_sends_no_order_to_a_site_of_another_protocol(
    trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer(monkeypatch)
    run = trial(FakeSite("a"), FakeSite("b"))
    words = rf"the site speaks protocol {PROTOCOL + 1} \(fedtune 9.9\), this coordinator protocol"
    with pytest.raises(Refused, match=words):
        run.run(make_study(min_sites=2))
    assert [site.calls for site in run.sites] == [[], []]


def test_without_the_check_the_coordinator_would(
    trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer(monkeypatch)
    monkeypatch.setattr(fedtune.server.admission, "check_peer", lambda *_: None)
    run = trial(FakeSite("a"), FakeSite("b"))
    run.run(make_study(min_sites=2))
    assert [len(site.calls) for site in run.sites] == [4, 4]


def test_a_study_outlives_another_release_at_a_site(
    trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "__version__", "9.9.9")
    run = trial(FakeSite("a"), FakeSite("b"))
    monkeypatch.setattr(
        fedtune.server.admission, "version_fields", lambda: version_fields() | {"release": "0.0.1"}
    )
    run.run(make_study(min_sites=2))
    assert [len(site.calls) for site in run.sites] == [4, 4]
