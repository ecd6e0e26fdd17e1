"""Every field that leaves a site in a whole run; and none of it tells how many units there are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

import fedtune.core.vault.prepared
import fedtune.core.vault.reading
import fedtune.core.vault.worker
from fedtune.core.config import load_site
from fedtune.core.data.records import unit_member
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.network import Network
from fedtune.core.objectives._interface import Batch
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.vault.declared import declare
from fedtune.core.wire.codec import layout
from fedtune.flower import api
from tests.guarantee.property_plans import CONSENT, OPT_OUTS
from tests.guarantee.world import Recorder, lay_out, leaves, patients, run

FROM_THE_PLAN = {"sigma", "q", "max_grad_norm", "records", "steps"}
ALLOWED = {
    "metadata.message_type": "str",
    "admission.name": "str",
    "admission.key": "str",
    "admission.declared_size": "int",
    "admission.status": "str",
    "admission.reason": "str",
    "admission.admitted": "bool",
    "admission.protocol": "int",
    "admission.release": "str",
    "site.name": "str",
    "site.status": "str",
    "site.reason": "str",
    "site.events": "str",
    "site.header": "str",
    "site.signature": "str",
}
HEADER = {"plan", "round", "base", "site", "receiver", "nonce", "body", "ledger"}


def trained(grid: Recorder) -> dict[str, tuple[int, ...]]:
    """The tensors that the plan trains, LoRA's B, by name."""
    saved = load_file(grid.files[0].parent / "run" / "adapter" / "adapter_model.safetensors")
    return {name: array.shape for name, array in saved.items() if ".lora_B." in name}


def outside(grid: Recorder, ranks: Mapping[str, int] | None = None) -> list[str]:
    """Every field of every reply that the allow-list does not name. ranks: of a site that trains so
    many columns."""
    strange = []
    for reply in grid.replies:
        name = str(reply.content["site"]["name"]) if "site" in reply.content else ""
        rank = (ranks or {}).get(name)
        shapes = {name: (rows, rank or most) for name, (rows, most) in trained(grid).items()}
        forms = layout(shapes, "int8").items()
        update = {f"update/{name}": f"{form.dtype} {form.shape}" for name, form in forms}
        for path, what in leaves(reply):
            if path.startswith("update/"):
                ok = update.get(path) == what
            elif path == "metadata.message_type":
                ok = what in ("train", "query.prepare")
            else:
                ok = ALLOWED.get(path) == what
            if not ok:
                strange.append(f"{path}: {what}")
        if "site" in reply.content:
            site = reply.content["site"]
            header = json.loads(str(site["header"]))
            strange += [f"header.{key}" for key in set(header) ^ HEADER]
            strange += [f"header.ledger.{key}" for key in set(header["ledger"]) ^ {"token"}]
            for event in json.loads(str(site["events"])):
                strange += [f"events.{key}" for key in set(event) ^ FROM_THE_PLAN]
    return strange


def shape(grid: Recorder) -> list[Any]:
    """What an observer of the wire sees but for the noised numbers: per message its size, type,
    fields, and every value that no key, nonce, signature or noise is in."""
    seen: list[Any] = [[len(body) for body in grid.sent]]
    for reply in grid.replies:
        facts = dict(leaves(reply))
        if not reply.has_error():
            for record in ("admission", "site"):
                for key, value in reply.content.get(record, {}).items():
                    if key not in ("key", "header", "signature"):
                        facts[f"{record}.{key}"] = str(value)
        seen.append(facts)
    return seen


def usual_of(objective: str, folders: pytest.TempPathFactory, base: Path) -> Recorder:
    return run(lay_out(folders.mktemp("usual"), base, patients(12), objective=objective))


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Recorder:
    return usual_of("causal_lm", tmp_path_factory, tiny_base)


@pytest.fixture(scope="module")
def usual_pairs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Recorder:
    return usual_of("dpo", tmp_path_factory, tiny_base)


@pytest.mark.parametrize("which", ["usual", "usual_pairs"])
def test_nothing_leaves_but_what_the_list_names(request: pytest.FixtureRequest, which: str) -> None:
    grid: Recorder = request.getfixturevalue(which)
    assert len(grid.replies) == 2 + 3 * 2 + 2  # plan, three rounds, and that it has ended
    assert outside(grid) == []
    assert {reply.metadata.message_type for reply in grid.replies} == {"train", "query.prepare"}


def test_pairs_look_like_any_other_study(usual: Recorder, usual_pairs: Recorder) -> None:
    """But for the plan and what is derived from it: the same fields, types and shapes."""
    for one, other in zip(usual.replies, usual_pairs.replies, strict=True):
        assert dict(leaves(one)) == dict(leaves(other))


@pytest.mark.long
def test_a_site_of_fewer_ranks_says_how_many_and_sends_narrower_arrays_and_nothing_else(
    usual: Recorder, tmp_path: Path, tiny_base: Path
) -> None:
    """`lora_rank`: one number that a person typed, there only where the plan lets sites choose."""
    study = lay_out(tmp_path, tiny_base, patients(12))
    study.write_text(study.read_text().replace("rank = 4", "rank = 4\nmin_rank = 1"))
    south = tmp_path / "site-south.toml"
    south.write_text(south.read_text().replace("[data]", "lora_rank = 1\n[data]"))
    grid = run(study)
    assert outside(grid, {"south": 1}) == ["admission.lora_rank: int"] * 2
    assert outside(grid).count("update/values: int8 (128,)") == 3, "caught, were it not said"
    said = [r.content["admission"] for r in grid.replies[:2]]
    assert {str(a["name"]): a["lora_rank"] for a in said} == {"north": 4, "south": 1}
    by_name = {str(r.content["site"]["name"]): r for r in grid.replies if "site" in r.content}
    north, south_sent = (dict(leaves(by_name[name])) for name in ("north", "south"))
    assert north == dict(leaves(usual.replies[-3]))  # before both hear that it has ended
    assert set(south_sent) == set(north)
    differ = {path for path, what in north.items() if south_sent[path] != what}
    assert differ <= {"update/values", "update/scales"}


def test_a_site_of_declared_data_says_so_in_one_word_and_nothing_else(
    usual: Recorder, tmp_path: Path, tiny_base: Path
) -> None:
    """`declared`: a word that a person typed, there only where it was."""
    study = lay_out(tmp_path, tiny_base, patients(12))
    south = tmp_path / "site-south.toml"
    south.write_text(south.read_text().replace("[data]", '[data]\ndeclared = "public"'))
    south.write_text(south.read_text().replace("[policy]", "[policy]\nallow_declared_data = true"))
    declare(load_site(south))
    grid = run(study)
    assert outside(grid) == ["admission.declared: str"]
    for one, other in zip(usual.replies, grid.replies, strict=True):
        more = set(leaves(other)) - set(leaves(one))
        assert {path for path, _ in more} <= {"admission.declared"}


def test_an_added_field_is_caught(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: a site that also sends its number of units."""
    honest = fedtune.core.vault.prepared.step_summary
    monkeypatch.setattr(
        fedtune.core.vault.worker,
        "step_summary",
        lambda steps: [{**event, "units": 12} for event in honest(steps)],
    )
    monkeypatch.setattr(
        "fedtune.server.admission._events", json.loads
    )  # and a server that takes it
    grid = run(lay_out(tmp_path, tiny_base, patients(12)))
    assert "events.units" in outside(grid)


VARIANTS: dict[str, Callable[[], list[Any]]] = {
    "one patient less": lambda: patients(11),
    "one patient": lambda: patients(1),
    "nobody": lambda: [],
    "many": lambda: patients(60),
    "a NaN record": lambda: [*patients(12), '{"who": "p", "q": NaN, "a": "y"}'],
    "rejected records": lambda: [
        *patients(6),
        *[{"who": "p", "q": "", "a": "y"}, {"who": "p", "a": "y"}, "not JSON", '{"q": "\\u0000"}'],
    ],
    "nothing but rejected records": lambda: ["{", "[]", '{"who": 1}'],
    "longer than any": lambda: [*patients(11), {"who": "p", "q": "long " * 5000, "a": "y"}],
}


@pytest.mark.parametrize("how", VARIANTS)
def test_the_wire_looks_the_same_whatever_the_records(
    usual: Recorder, tmp_path: Path, tiny_base: Path, how: str
) -> None:
    grid = run(lay_out(tmp_path, tiny_base, VARIANTS[how]()))
    assert shape(grid) == shape(usual)


PAIRS: dict[str, Callable[[], list[Any]]] = {
    "nobody": lambda: [],
    "rejected pairs": lambda: [
        *patients(6),
        *[{"who": "p", "q": "x", "a": "y"}, {"who": "p", "q": "x", "a": "y", "b": ""}, "not JSON"],
    ],
    "a worse answer longer than any": lambda: [
        *patients(11),
        {"who": "p", "q": "x", "a": "y", "b": "long " * 5000},
    ],
}


@pytest.mark.parametrize("how", PAIRS)
def test_the_wire_looks_the_same_whatever_the_pairs(
    usual_pairs: Recorder, tmp_path: Path, tiny_base: Path, how: str
) -> None:
    grid = run(lay_out(tmp_path, tiny_base, PAIRS[how](), objective="dpo"))
    assert shape(grid) == shape(usual_pairs)


def test_a_record_that_makes_the_loss_nan_is_not_seen(
    usual: Recorder, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, whole = CausalLM().losses, fedtune.core.vault.worker.local_round

    def losses(network: Network, batch: Batch) -> torch.Tensor:
        return honest(network, batch) * torch.where(batch.index == 3, torch.nan, 1.0)

    def with_nan(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CausalLM, "losses", staticmethod(losses))
            return whole(*arguments)

    monkeypatch.setattr(fedtune.core.vault.worker, "local_round", with_nan)
    grid = run(lay_out(tmp_path, tiny_base, patients(12)))
    assert shape(grid) == shape(usual)
    for reply in grid.replies:
        for name, array in reply.content.get("update", {}).items():
            assert torch.isfinite(torch.from_numpy(array.numpy())).all(), name


def test_a_withdrawal_between_rounds_is_not_seen(
    usual: Recorder, tmp_path: Path, tiny_base: Path
) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12))
    rounds_done = []

    def between(kind: str) -> None:
        if kind == "round":
            rounds_done.append(kind)
            if len(rounds_done) == 1:
                Ledger(tmp_path / "state-north").withdraw(unit_member("patient-3"))

    assert shape(run(study, between)) == shape(usual)
    assert len(Ledger(tmp_path / "state-north").withdrawn()) == 1


def asking(folder: Path, base: Path, opted: Callable[[int], bool], how: str) -> Path:
    """A study whose northern site asks its patients, of whom these opted out."""
    rows = [
        row | {"agreed": "no" if opted(int(row["who"].partition("-")[2])) else "yes"}
        for row in patients(12)
    ]
    study = lay_out(folder, base, rows)
    north = folder / "site-north.toml"
    table = CONSENT[how]
    north.write_text(north.read_text().replace("[policy]", f"{table}\n[policy]"))
    keys = {row["who"] for row in rows if row["agreed"] == "no"}
    write_list(folder, keys)
    return study


def write_list(folder: Path, keys: set[str]) -> None:
    path = folder / OPT_OUTS
    path.touch(mode=0o600)
    lines = (hashlib.sha256(key.encode()).hexdigest() + "\n" for key in keys)
    path.write_text("".join(lines))


@pytest.mark.parametrize("how", ["column", "list"])
@pytest.mark.parametrize(
    "opted", [lambda n: False, lambda n: n == 3, lambda n: True], ids=["nobody", "one", "all"]
)
def test_the_wire_looks_the_same_whoever_opted_out(
    usual: Recorder, tmp_path: Path, tiny_base: Path, opted: Callable[[int], bool], how: str
) -> None:
    assert shape(run(asking(tmp_path, tiny_base, opted, how))) == shape(usual)


@pytest.mark.parametrize("then", ["one more", "gone", "open", "broken"])
def test_the_wire_looks_the_same_whatever_becomes_of_the_list_between_rounds(
    usual: Recorder, tmp_path: Path, tiny_base: Path, then: str
) -> None:
    """Where it cannot be read, nobody trains: the site sends noise alone, which looks alike."""
    study, seen = asking(tmp_path, tiny_base, lambda n: n == 3, "list"), list[str]()

    def between(kind: str) -> None:
        if kind == "round" and not seen:
            seen.append(kind)
            path = tmp_path / OPT_OUTS
            if then == "one more":
                write_list(tmp_path, {"patient-3", "patient-4"})
            elif then == "gone":
                path.unlink()
            elif then == "open":
                path.chmod(0o644)
            else:
                path.write_text("patient-3\n")

    assert shape(run(study, between)) == shape(usual)
    assert seen
    counts = json.loads((tmp_path / "state-north" / "counts.json").read_text())["records"]
    assert counts["units"] == (10 if then == "one more" else 0)


def test_a_site_that_fails_for_a_record_is_caught(
    usual: Recorder, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: a site that gives up where it has no records."""
    honest = fedtune.core.vault.reading.load_dataset
    monkeypatch.setattr(
        fedtune.core.vault.reading,
        "load_dataset",
        lambda *a, strict, **k: honest(*a, strict=True, **k),
    )
    monkeypatch.setattr(fedtune.core.vault.worker, "Dataset", None)  # what it falls back on
    study = lay_out(tmp_path, tiny_base, [])
    with pytest.raises(Exception, match="failed"):
        run(study)


def test_the_bytes_are_flowers_own(usual: Recorder) -> None:
    """What was recorded is what Flower's wire format carries: it parses back whole."""
    for body in usual.sent:
        assert api.message_from_proto(api.ProtoMessage.FromString(body)) is not None
