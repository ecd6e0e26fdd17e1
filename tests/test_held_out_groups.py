"""Held-out records are asked about by class and by group, and no unit moves an answer by more."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.accounting.costs import query_lines
from fedtune.accounting.query_noise import forecast
from fedtune.core.config import Study, load_site, load_study
from fedtune.core.data.group_reader import group_reader
from fedtune.core.dp import noise, query
from fedtune.core.dp.accountant import epsilon
from fedtune.core.dp.plan import SitePlan
from fedtune.core.dp.steplog import StepLog, events
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.cache import CachedDataset
from fedtune.core.run_folder import load_plan
from fedtune.core.vault.worker import SiteWorker
from fedtune.evidence.dossier.release import release
from fedtune.evidence.told import digest_of_adapter, state
from fedtune.evidence.verify import verify
from fedtune.public.start import start
from fedtune.report.held_out import write_shown
from tests.cli_kit import run as command
from tests.dashboard.test_pages import shown as page
from tests.held_out_kit import Row, lay_out, note
from tests.query_rows import GivenRows, all_rows
from tests.simulated import noise_from, simulate

CELLS = 1 + 2 + 2 + 3


def columns_of(number: int) -> str:
    """As many columns of one group each, for `groups`."""
    return ", ".join(f'c{n} = ["a"]' for n in range(number))


SEXES: tuple[Any, ...] = ("female", "male", " male ", "unknown", "", None, 7)
AGES: tuple[Any, ...] = (3, "17.5", 18, 64.9, 65, "nan", "inf", "old", None)


def drawn_rows(seed: int, patients: int = 20) -> list[Row]:
    """Notes of patients with one to four records, of every class, sex and age, known or not."""
    draw = random.Random(seed)
    return [
        note(
            f"p{patient}",
            draw.choice(("benign", "malignant", "malignant", "neither")),
            gender=draw.choice(SEXES),
            years=draw.choice(AGES),
            n=number,
        )
        | {"note": f"scan {number} of {patient}"}
        for patient in range(patients)
        for number in range(draw.randint(1, 4))
    ]


def read(folder: Path, base: Path, rows: list[Row]) -> tuple[Study, CachedDataset]:
    """The plan and the held-out records as the site reads them, with the adapter of the start."""
    path, (site, *_) = lay_out(folder, base, {"north": rows}, 3.0)
    made = start(load_study(path))
    worker = SiteWorker(load_site(site), site)
    assert worker.prepare(made.study, made.frozen).admitted
    prepared = worker._require(made.study.digest)
    prepared.network.load_frozen(prepared.frozen)
    prepared.network.load_trainable(made.adapter)
    held_out = worker.site.evaluation
    assert held_out is not None
    return made.study, worker.data_in_study(made.study, prepared.network, held_out)


def sums(study: Study, rows: torch.Tensor, folder: Path) -> torch.Tensor:
    """What is added up, without its noise."""
    log = StepLog(folder / "steps.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "gaussian_on_grid", lambda n, *_: torch.zeros(n, dtype=torch.int64))
        return query.answer(query.query_plan(study), GivenRows(rows.clone()), log, 1).double()


def test_one_unit_moves_the_sums_by_no_more_than_the_norm(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    """Of each of the units that were drawn, and of rows of any length and content."""
    study, data = read(tmp_path, tiny_encoder, drawn_rows(0))
    rows = all_rows(study, data)
    assert study.query_norm == pytest.approx(math.sqrt(2 * 4)) and rows.shape[1] == 2 * CELLS
    assert float(rows.norm(dim=1).max()) <= study.query_norm
    draw = torch.Generator().manual_seed(1)
    wild = torch.randn(40, 2 * CELLS, generator=draw, dtype=torch.float64)
    wild *= 10 ** (6 * torch.rand(40, 1, generator=draw, dtype=torch.float64) - 2)
    wild[0, 3], wild[1, 5], wild[2] = math.nan, math.inf, 0.0
    every = torch.cat([rows, wild])
    whole, largest = sums(study, every, tmp_path), 0.0
    for unit in range(len(every)):
        others = torch.cat([every[:unit], every[unit + 1 :]])
        moved = float((whole - sums(study, others, tmp_path)).norm())
        assert moved <= study.query_norm * (1 + 1e-4)  # fp32 in the sums
        largest = max(largest, moved)
    assert largest > 0.99 * study.query_norm


@pytest.mark.parametrize("most", [200, 64, 1])
def test_rows_are_made_for_some_units_at_once(
    tmp_path: Path, tiny_encoder: Path, most: int
) -> None:
    """How much memory an answer needs does not follow from how many units there are; where it is
    refused for some together, it is not for one."""

    class Refused(GivenRows):
        def of_units(self, units: Sequence[int]) -> torch.Tensor:
            asked.append(len(units))
            if len(units) > most:
                raise MemoryError
            return super().of_units(units)

    study, _ = read(tmp_path / "study", tiny_encoder, drawn_rows(0, patients=1))
    rows, asked = torch.full((200, 2 * CELLS), 0.1, dtype=torch.float64), list[int]()
    log, plan = StepLog(tmp_path / "steps.jsonl"), SitePlan(query.query_plan(study))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "gaussian_on_grid", lambda n, *_: torch.zeros(n, dtype=torch.int64))
        found = query.answer(plan, Refused(rows.clone()), log, 1).double()
    assert torch.equal(found, sums(study, rows, tmp_path))
    assert max(asked) <= 64


def test_a_units_row_is_its_own_records_and_nobody_elses(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    rows = drawn_rows(2)
    study, data = read(tmp_path / "all", tiny_encoder, rows)
    every = all_rows(study, data)
    for at, key in enumerate(data.dataset.keys[:6]):
        without = [row for row in rows if row["who"].encode() not in key.split(b"\0")]
        assert len(without) < len(rows)
        _, left = read(tmp_path / f"without-{at}", tiny_encoder, without)
        expected = torch.cat([every[:at], every[at + 1 :]])
        assert torch.equal(all_rows(study, left), expected)


def test_what_the_plan_does_not_name_counts_nowhere(tmp_path: Path, tiny_encoder: Path) -> None:
    """Unknown values and labels, numbers that are none, and a patient without a usable record."""
    rows = [
        note("a", "benign", gender="female", years=30),
        note("b", "malignant", gender="divers", years="nan"),
        note("c", "neither", gender="male", years=3),
        note("d", "benign", gender=" male", years=65) | {"note": "first"},
        note("d", "malignant", gender=None, years=None) | {"note": "second"},
    ]
    study, data = read(tmp_path, tiny_encoder, rows)
    found = all_rows(study, data).view(-1, CELLS, 2)[..., 1]
    #      all  benign malignant  female male  below 18, 18 to 65, 65 and above
    assert found.tolist() == [
        [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0],
        [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 0.5, 0.5, 0.0, 0.5, 0.0, 0.0, 0.5],
    ]
    assert [value for _, value in study.query_cells][-3:] == [
        "below 18",
        "18 to below 65",
        "65 and above",
    ]


def test_a_score_that_is_none_takes_its_unit_alone_out_of_every_sum(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [note(who, "benign", gender="female", years=30) for who in "abc"]
    study, data = read(tmp_path, tiny_encoder, rows)
    honest, network = data.network.logits, data.network
    bad = honest(torch.zeros(1, network.hidden_size)) * math.nan

    def logits(selected: torch.Tensor) -> torch.Tensor:
        found = honest(selected)
        return torch.where((selected == broken).all(dim=1)[:, None], bad, found)

    ((batch, _),) = data.compute_blocks(lambda _: None, [1])
    broken = network.pool(network.hidden(batch.prefix, batch.mask), batch.mask)[0]
    monkeypatch.setattr(network, "logits", logits)
    made = all_rows(study, data)
    assert made.isnan().any(dim=1).tolist() == [False, True, False]
    assert sums(study, made, tmp_path)[1::2].tolist() == [2.0, 2.0, 0.0, 2.0, 0.0, 0.0, 2.0, 0.0]


def test_a_column_that_the_site_does_not_name_is_not_read(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    """A plan may name any column; of one that site.toml does not name nobody is in a group."""
    apart = 'groups = { who = ["a"], gender = ["female"] }\n'
    rows = [note("a", "benign", gender="female")]
    path, (site, *_) = lay_out(tmp_path, tiny_encoder, {"north": rows}, 3.0, apart)
    study = load_study(path)
    held_out = load_site(site).evaluation
    assert held_out is not None
    assert group_reader(held_out, study)({**rows[0]}) == (-1, -1)
    named = held_out.model_copy(update={"groups": {"gender": "gender"}})
    assert group_reader(named, study)({**rows[0]}) == (-1, 0)
    assert group_reader(load_site(site).data, study)({**rows[0]}) == ()


@pytest.mark.parametrize(
    "table, reason",
    [
        ('groups = { class = ["a"] }', "objective.labels"),
        ('groups = { age = ["a"] }\nbands = { age = [3] }', "the column is named in groups too"),
        ("groups = { sex = [] }", "at least one"),
        ('groups = { sex = ["a", " a"] }', "each value once"),
        ("bands = { age = [65, 18] }", "must rise"),
        ("bands = { age = [] }", "at least 1"),
        (f"groups = {{ {columns_of(21)} }}", "at most 20 columns, because"),
        (f"classes = true\ngroups = {{ {columns_of(20)} }}", "at most 19 columns beside classes"),
    ],
)
def test_a_plan_that_tells_nothing_apart_is_refused(
    tmp_path: Path, tiny_encoder: Path, table: str, reason: str
) -> None:
    path, _ = lay_out(tmp_path, tiny_encoder, {"north": []}, 3.0, table)
    with pytest.raises(Exception, match=reason):
        load_study(path)


def test_a_plan_that_tells_nobody_apart_is_the_same_plan(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    """So that its digest, and with it each signature and charge of before, is what it was."""
    path, _ = lay_out(tmp_path, tiny_encoder, {"north": []}, 3.0, "")
    study = load_study(path)
    assert study.query_norm == math.sqrt(2) and study.query_cells == (("", ""),)
    assert json.loads(study.model_dump_json())["private_evaluation"] == {
        "noise_multiplier": 3.0,
        "every": 1,
    }


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A run of two sites that were asked with next to no noise."""
    folder = tmp_path_factory.mktemp("asked")
    held_out = {"north": drawn_rows(3, 60), "south": drawn_rows(4, 40)}
    study, _ = lay_out(folder, tiny_encoder, held_out, 1e-3)
    with noise_from(0):
        done = command("simulate", study, "--sites", folder, "--out", folder / "run")
    assert done.exit_code == 0, done.output
    return folder


def test_one_answer_is_one_event_of_one_mechanism(asked: Path) -> None:
    study = load_study(asked / "study.toml")
    for name in ("north", "south"):
        steps = StepLog(asked / f"state-{name}" / "steps.jsonl").steps()
        queried = [step for step in steps if step.study.endswith(":evaluation")]
        assert [(s.noise_multiplier, s.max_grad_norm) for s in queried] == [(1e-3, math.sqrt(8))]
        report = json.loads((asked / "run" / "report.json").read_text())
        paid = report["privacy"]["evaluation"]["sites"][name]["epsilon"]
        assert paid == pytest.approx(epsilon(events(queried), 1e-3))
    plain = study.model_copy(
        update={"private_evaluation": study.private_evaluation.changed(bands={}, classes=False)}  # type: ignore[union-attr]
    )
    assert query.query_plan(plain).epsilon == query.query_plan(study).epsilon


def test_with_little_noise_the_table_is_the_exact_one(asked: Path) -> None:
    table = json.loads((asked / "run" / "report.json").read_text())["held_out"]
    rows = {(r["by"], r["value"], r["site"]): r for r in table["rows"]}
    held_out = {"north": drawn_rows(3, 60), "south": drawn_rows(4, 40)}
    for site, notes in held_out.items():
        usable = [row for row in notes if row["finding"] != "neither"]
        count = {row["who"]: sum(r["who"] == row["who"] for r in usable) for row in usable}
        for key, value, mine in (
            ("class", "benign", lambda r: r["finding"] == "benign"),
            ("sex", "male", lambda r: str(r["gender"]).strip() == "male"),
            ("age", "below 18", lambda r: r["years"] in (3, "17.5")),
        ):
            share = sum(1 / count[row["who"]] for row in usable if mine(row))
            assert rows[key, value, site]["units"] == pytest.approx(share, abs=0.05)
        whole = rows["", "", site]
        parts = [rows["class", label, site] for label in ("benign", "malignant")]
        right = sum(part["units"] * part["score"] for part in parts)
        assert whole["units"] * whole["score"] == pytest.approx(right, abs=0.05)
    pooled = [rows["sex", "female", at]["units"] for at in ("", "north", "south")]
    assert pooled[0] == pytest.approx(pooled[1] + pooled[2], abs=0.05)
    assert np.all([r["interval"][0] <= r["score"] <= r["interval"][1] for r in table["rows"]])


def test_the_plan_says_the_noise_of_each_cell(asked: Path) -> None:
    study = load_study(asked / "study.toml").changed(private_evaluation={"noise_multiplier": 2.0})
    (line,) = query_lines(study, 3)
    alone, apart = forecast(2.0, 3)[100], forecast(2.0, 3, 4)[100]
    assert alone is not None and apart is not None and apart == pytest.approx(2 * alone)
    assert f"100: ± {apart:.2g}" in line and "class, sex, age" in line


def told(folder: Path, decision: str) -> None:
    """Put into the run what a person at north told of its model."""
    run = folder / "run"
    model = {"plan": load_plan(run).digest, "adapter": digest_of_adapter(run)}
    record = {"site": "north", "decision": decision, "time": "2026-05-01T08:00:00Z"}
    (run / "told").mkdir(exist_ok=True)
    key = Ledger(folder / "state-north").key
    (run / "told" / "north.json").write_bytes(state(record | {"model": model}, key))


def test_the_table_stands_where_a_coordinator_looks(asked: Path, tmp_path: Path) -> None:
    """In status, dashboard, report and dossier the same rows, beside what sites told."""
    told(asked, "accepted")
    run = asked / "run"
    shown = write_shown(json.loads((run / "report.json").read_text()))
    assert shown is not None and len(shown.rows) == 3 * CELLS
    release(run, tmp_path / "dossier")
    assert verify(tmp_path / "dossier").dossier["approvals"] == []
    status = command("status", run, "--once")
    assert status.exit_code == 0, status.output
    places = {
        "status": status.output,
        "dashboard": page(run),
        "report": (run / "report.md").read_text(),
        "dossier": (tmp_path / "dossier" / "dossier.md").read_text(),
    }
    for name, text in places.items():
        plain = " ".join(re.sub(r"<[^>]*>|\\|\|", " ", text).split())
        for row in shown.rows:
            cells = [cell for cell in row[2:] if cell]
            assert all(cell in plain for cell in cells), (name, row)
        assert "age: 18 to below 65" in plain or name == "status", name
        assert all(line.split(": ", 1)[-1].rstrip(".") in plain for line in shown.lines[1:-1]), name
        if name != "report":  # which was signed when the run ended, before anybody told anything
            assert "north" in plain and "accepted" in plain, name
    assert "Subgroups were not compared" not in places["dossier"]
    assert "Groups were compared as far as the table above tells them apart" in places["dossier"]


def test_a_dossier_says_that_groups_were_not_compared_where_they_were_not(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    """Classes alone are no groups of patients."""
    rows = [note(f"p{n}", "benign", gender="male", years=3) for n in range(4)]
    study, sites = lay_out(tmp_path, tiny_encoder, {"north": rows}, 3.0, "classes = true\n")
    simulate(study, sites, tmp_path / "run")
    release(tmp_path / "run", tmp_path / "dossier")
    text = (tmp_path / "dossier" / "dossier.md").read_text()
    assert "Subgroups were not compared, unless a person says so below" in text
    assert "Groups were compared" not in text and "class: benign" in text
    assert "No difference between groups, classes or sites is resolved." in text
