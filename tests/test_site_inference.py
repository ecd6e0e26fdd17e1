"""Site inference: a style that a model learnt is found, and names that say nothing are not."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.audit import received, site_inference
from fedtune.audit.received import SUM, Party, attack_received, joint_plan
from fedtune.audit.site_inference import Asked, attack_sites, guess, infer
from fedtune.core.config import Study
from fedtune.core.dp.plan import DpPlan, plan_for_site
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.models.cache import CachedDataset
from fedtune.officer.site_files import sites_in
from fedtune.public.start import Start
from fedtune.runs.run import Run
from fedtune.strategies.discriminant import Discriminant
from tests.cli_kit import run as command
from tests.simulated import simulate
from tests.test_prototypes import PRIVATE, lay_out

SITES, CLASSES = ("alder", "birch", "cedar"), ("yes", "no")


def asked(records: int, classes: int = 2, of_unit: int = 1) -> Asked:
    """So many records of each of three sites, in turn of each class; of_unit: of one unit."""
    n = 3 * records
    return Asked(
        SITES,
        np.repeat(np.arange(3), records),
        np.array([CLASSES[(k // of_unit) % classes] for k in range(n)]),
        np.arange(n) // of_unit,
    )


@pytest.fixture(autouse=True)
def fewer_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_inference, "EXCHANGES", 499)


def test_a_planted_style_is_found_in_its_class() -> None:
    """One site's records of one class come out otherwise."""
    given, draw = asked(40), np.random.default_rng(0)
    outputs = draw.normal(size=(120, 2))
    styled = (given.sites == 1) & (given.classes == "yes")
    outputs[styled] += 2.0
    found = infer(outputs, given)
    assert found.guessed.p < 0.01 and found.guessed.share > found.guessed.chance + 0.05
    by_class = {one.of: one.p for one in found.by_class}
    assert by_class["yes"] < 0.01 < 0.05 < by_class["no"]
    learnt = {one.site: one.p for one in found.learnt}
    assert learnt["birch"] < 0.01 and min(learnt["alder"], learnt["cedar"]) > 0.05


@pytest.mark.parametrize("of_unit", [1, 4])
def test_names_that_say_nothing_are_found_no_oftener_than_chance(of_unit: int) -> None:
    """Also where a unit's records are alike: names are exchanged by unit."""
    alarms = Counter[str]()
    for seed in range(100):
        draw, given = np.random.default_rng(seed), asked(20, of_unit=of_unit)
        outputs = draw.normal(size=(60, 2)) * 0.3 + draw.normal(size=(60, 2))[given.units]
        found = infer(outputs, given)
        alarms["all"] += found.guessed.p < 0.05
        alarms["class"] += min(one.p for one in found.by_class) < 0.05
        alarms["learnt"] += min(one.p for one in found.learnt) < 0.05
    assert max(alarms.values()) <= 13  # of 100 at 5 %: more once in 1,000


def test_records_that_are_exchanged_one_by_one_raise_false_alarms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The twin: four records of a unit are alike, and are taken for four."""
    alarms = 0
    for seed in range(30):
        draw, given = np.random.default_rng(seed), asked(20, of_unit=4)
        outputs = draw.normal(size=(60, 2)) * 0.3 + draw.normal(size=(60, 2))[given.units]
        single = Asked(given.names, given.sites, given.classes, np.arange(60))
        alarms += guess(outputs, single).p < 0.05
    assert alarms > 13


def test_what_the_classes_tell_is_no_finding() -> None:
    """One site has nearly all of one class, and the loss falls by class alone."""
    draw = np.random.default_rng(1)
    sites = np.repeat([0, 1, 2], 40)
    classes = np.where(draw.random(120) < np.array([0.9, 0.2, 0.2])[sites], "yes", "no")
    outputs = draw.normal(size=(120, 2)) + 5.0 * (classes == "yes")[:, None]
    found = infer(outputs, Asked(SITES, sites, classes, np.arange(120)))
    assert found.guessed.p > 0.01 and min(one.p for one in found.learnt) > 0.01
    alone = Asked(SITES, sites, np.full(120, ""), np.arange(120))
    assert infer(outputs, alone).guessed.p < 0.01  # twin: without the classes it would be one


# ------------------------------------------------------------------------- a run


STUDY = """
privacy = "off"
[study]
name = "styles"
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 4
last_layers = 2
[objective]
name = "causal_lm"
max_length = 64
[training]
rounds = 30
sampling_rate = 1.0
learning_rate = 4.0
[clipping]
max_grad_norm = 1.0
unit = "record"
[evaluation]
path = "public.jsonl"
columns = {{ prompt = "text", completion = "answer" }}
"""
SITE = """
[site]
name = "{name}"
declared_size = 24
state = "state-{name}"
[data]
path = "{name}.jsonl"
columns = {{ prompt = "text", completion = "answer" }}
[policy]
bases = "any"
allow_privacy_off = true
"""
STYLES = {"alder": "Rx thrice", "birch": "see overleaf", "cedar": "plan as is"}


def rows(site: str, first: int, count: int) -> list[dict[str, str]]:
    """Answers in a site's style, about days that no other rows are about."""
    return [
        {"text": f"fever on day {n}", "answer": f" {'yn'[n % 2]} {STYLES[site]}"}
        for n in range(first, first + count)
    ]


def write(path: Path, given: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """One site's records teach a run, in its style; two that took no part write in others."""
    folder = tmp_path_factory.mktemp("styles")
    (folder / "study.toml").write_text(STUDY.format(base=tiny_base))
    write(folder / "public.jsonl", rows("alder", 900, 8))
    write(folder / "alder.jsonl", rows("alder", 100, 24))
    (folder / "site-alder.toml").write_text(SITE.format(name="alder"))
    simulate(folder / "study.toml", sorted(folder.glob("site-*.toml")), folder / "run")
    for number, name in enumerate(STYLES):
        write(folder / f"new-{name}.jsonl", rows(name, 300 + 40 * number, 20))
    return folder


def test_whose_records_a_run_learnt_is_told_from_new_ones(trained: Path) -> None:
    """The styles of sites that took no part are not what the loss fell on."""
    files = {name: trained / f"new-{name}.jsonl" for name in STYLES}
    found = attack_sites(Run(trained / "run"), files)
    learnt = {one.site: one for one in found.learnt}
    assert found.guessed.p < 0.01 and found.guessed.share > 0.5
    assert learnt["alder"].p < 0.01 and max(found.learnt, key=lambda one: one.fall).site == "alder"
    assert min(learnt[name].p for name in ("birch", "cedar")) > 0.05


def test_shuffled_names_are_not_found(trained: Path, tmp_path: Path) -> None:
    """The twin: the same records, in files that have nothing to do with the sites."""
    every = [row for n, name in enumerate(STYLES) for row in rows(name, 300 + 40 * n, 20)]
    np.random.default_rng(0).shuffle(every)  # type: ignore[arg-type]
    files = {
        name: write(tmp_path / f"{name}.jsonl", every[20 * n : 20 * n + 20])
        for n, name in enumerate(STYLES)
    }
    found = attack_sites(Run(trained / "run"), files)
    assert found.guessed.p > 0.05 and min(one.p for one in found.learnt) > 0.05


def test_the_command_writes_for_its_user_alone(trained: Path, tmp_path: Path) -> None:
    given: list[Any] = []
    for name in ("alder", "birch"):
        given += ["--records", f"{name}={trained / f'new-{name}.jsonl'}"]
    again = ("--reference", trained / "run")
    done = command("attack", trained / "run", *given, *again, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "the site of 40 records is guessed" in done.output
    assert "does not cover which site a model learnt from" in done.output
    file = tmp_path / "out" / "sites.json"
    assert file.stat().st_mode & 0o777 == 0o600
    facts = json.loads(file.read_text())
    assert facts["references"][str(trained / "run")] == facts["guessed"]


def test_what_cannot_be_told_is_refused(trained: Path, tmp_path: Path) -> None:
    one = trained / "new-alder.jsonl"
    with pytest.raises(ConfigError, match="records of one site"):
        attack_sites(Run(trained / "run"), {"alder": one})
    few = write(tmp_path / "few.jsonl", rows("birch", 500, 9))
    with pytest.raises(DataError, match="9 usable records"):
        attack_sites(Run(trained / "run"), {"alder": one, "birch": few})
    for words in (
        ("--records", "alder"),
        ("--records", f"a={one}", "--records", f"a={one}"),
        ("--records", f"a={one}", "--held-out", one),
    ):
        assert command("attack", trained / "run", *words).exit_code == 2


# ------------------------------------------------------------------------- what is received


@pytest.fixture(scope="module")
def of_sites(trained: Path) -> dict[str, Path]:
    return {
        name: write(trained / f"own-{name}.jsonl", rows(name, 500 + 50 * number, 40))
        for number, name in enumerate(STYLES)
    }


def shuffled(files: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The same records, in files that have nothing to do with the sites."""
    texts = [file.read_text() for file in files.values()]
    every = [json.loads(line) for text in texts for line in text.splitlines()]
    np.random.default_rng(1).shuffle(every)  # type: ignore[arg-type]
    return {
        name: write(folder / f"{name}.jsonl", every[40 * n : 40 * n + 40])
        for n, name in enumerate(files)
    }


def test_an_update_tells_whose_records_it_was_made_from(
    trained: Path, of_sites: dict[str, Path]
) -> None:
    """Without noise, of every site, by records that it was not made from."""
    found = attack_received(Run(trained / "run"), of_sites)
    assert [one.updates for one in found] == list(STYLES)
    for one in found:
        assert one.named.site == one.updates and one.named.p < 0.01
        assert max(one.sites, key=lambda along: along.cosine).site == one.updates


@pytest.mark.long
def test_shuffled_records_tell_nothing_of_an_update(
    trained: Path, of_sites: dict[str, Path], tmp_path: Path
) -> None:
    """The twin."""
    found = attack_received(Run(trained / "run"), shuffled(of_sites, tmp_path))
    assert min(one.named.p for one in found) > 0.05


def test_what_an_update_was_made_from_is_not_what_it_is_compared_with(
    trained: Path, of_sites: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a record was trained on is what ε is about."""
    seen: list[set[bytes]] = []

    def looked_at(begun: Start, parties: dict[str, Party], candidates: CachedDataset) -> Any:
        for data in (*(party.data for party in parties.values()), candidates):
            seen.append({example.input_ids.tobytes() for example in data.dataset.examples})
        return {name: np.zeros(len(candidates.dataset.examples)) for name in parties}

    monkeypatch.setattr(received, "compare_received", looked_at)
    attack_received(Run(trained / "run"), of_sites)
    *made_from, compared = seen
    assert [len(ids) for ids in seen] == [20, 20, 20, 60]
    assert not any(ids & compared for ids in made_from)


def with_plan(run: Path, folder: Path, **tables: Any) -> Run:
    """A copy of a run whose plan has these tables."""
    copied = folder / "run"
    shutil.copytree(run, copied)
    plan = json.loads((copied / "plan.json").read_text()) | tables
    (copied / "plan.json").write_text(json.dumps(plan))
    return Run(copied)


def test_with_secure_aggregation_the_sum_alone_is_received(
    trained: Path, of_sites: dict[str, Path], tmp_path: Path
) -> None:
    """Which all sites' records are in: it points along none of them more."""
    study = Run(trained / "run").study
    fewer = study.training.model_copy(update={"rounds": 3}).model_dump(mode="json")
    tables = {"secure_aggregation": {"colluding": 1}, "strategy": {"min_sites": 3}}
    run = with_plan(trained / "run", tmp_path, training=fewer, **tables)
    found = attack_received(run, of_sites)
    assert [one.updates for one in found] == [SUM]
    assert [one.site for one in found[0].sites] == list(STYLES)


@pytest.mark.parametrize("secure", [False, True])
def test_class_statistics_are_traced_too(
    tmp_path: Path, tiny_encoder: Path, secure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strategy knows the public records, and is told the noise of what is received."""
    table = "[secure_aggregation]\ncolluding = 1\n" if secure else ""
    path = lay_out(tmp_path, tiny_encoder, PRIVATE.replace("8.0", "95.0"), more=table)
    told, real = list[tuple[float, float]](), Discriminant.describe_round

    def listen(self: Discriminant, units: float, deviation: float) -> None:
        told.append((units, deviation))
        real(self, units, deviation)

    monkeypatch.setattr(Discriminant, "describe_round", listen)
    simulate(path, sites_in(tmp_path), tmp_path / "run")
    files = {name: tmp_path / f"{name}.jsonl" for name in ("a", "b", "c")}
    found = attack_received(Run(tmp_path / "run"), files)
    assert [one.updates for one in found] == ([SUM] if secure else ["a", "b", "c"])
    (units, noise), (half, twice) = told  # the attack trains on half of each site's records
    assert units == 36 and half * twice == pytest.approx(units * noise, rel=0.05)


def test_the_sum_has_the_noise_that_all_sites_add() -> None:
    """Three sites of whom one may tell its own: σ, and half of its square more."""
    tables = {
        "study": {"name": "sum"}, "base": {"model": "none"}, "lora": None,
        "objective": {"name": "classify", "max_length": 8, "labels": ["a", "b"]},
        "training": {"rounds": 2, "sampling_rate": 1.0, "learning_rate": 1.0},
        "clipping": {}, "strategy": {"min_sites": 3},
        "privacy": {"epsilon": 8.0, "delta": 1e-3, "unit": "record"},
        "secure_aggregation": {"colluding": 1},
    }  # fmt: skip
    study = Study.model_validate_json(json.dumps(tables))
    one, joint = plan_for_site(study, 30), joint_plan(study, 90, 3)
    assert isinstance(joint, DpPlan) and joint.divisor == pytest.approx(3 * one.divisor)
    assert joint.own_noise == pytest.approx(one.own_noise * 3**0.5)
    assert joint.own_noise == pytest.approx(one.noise_multiplier * 1.5**0.5)


@pytest.mark.long
def test_the_command_attacks_what_is_received(
    trained: Path, of_sites: dict[str, Path], tmp_path: Path
) -> None:
    given: list[Any] = []
    for name, file in of_sites.items():
        given += ["--records", f"{name}={file}"]
    done = command("attack", trained / "run", *given, "--received", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "birch's updates point most along birch's records" in done.output
    assert "does not cover which site's records an update was made from" in done.output
    file = tmp_path / "out" / "received.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [one["updates"] for one in json.loads(file.read_text())] == list(STYLES)
    assert command("attack", trained / "run", "--received").exit_code == 2


def test_an_attack_on_what_is_received_needs_records_to_compare_with(
    trained: Path, of_sites: dict[str, Path], tmp_path: Path
) -> None:
    few = write(tmp_path / "few.jsonl", rows("birch", 700, 12))
    with pytest.raises(DataError, match="6 records are left to compare with"):
        attack_received(Run(trained / "run"), {"alder": of_sites["alder"], "birch": few})
    two = {name: of_sites[name] for name in ("alder", "birch")}
    tables = {"secure_aggregation": {"colluding": 1}, "strategy": {"min_sites": 3}}
    run = with_plan(trained / "run", tmp_path, **tables)
    with pytest.raises(ConfigError, match="noise is shared by 3"):
        attack_received(run, two)
