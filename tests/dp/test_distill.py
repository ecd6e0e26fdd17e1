"""Distillation at the sites: each record's targets are the teacher's word on that record alone, and
the teacher saw no record, or only through noise. Twins: a teacher that is fitted to the records."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedtune.core.bases.find import find_base
from fedtune.core.config import (
    Columns,
    DataFile,
    PolicyTable,
    SiteData,
    Study,
    load_site,
    load_study,
)
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.load import load_dataset
from fedtune.core.dp import clip
from fedtune.core.errors import ConfigError, NotGenuine, PolicyRefused
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models import teacher as teacher_module
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.loaded import load
from fedtune.core.models.network import Network
from fedtune.core.models.teacher import (
    TeacherFunction,
    find_teacher,
    soft_targets_of,
    teacher_for,
)
from fedtune.core.objectives.distill import Distill, divergence
from fedtune.core.registry import process_cache
from fedtune.core.training import selftest
from fedtune.core.training.unit_gradients import UnitGradientEngine
from fedtune.core.vault.policy import refusals
from fedtune.evidence.verify import verify
from fedtune.officer.review import review
from tests.cli_kit import run as command
from tests.dp.conftest import study
from tests.simulated import simulate
from tests.test_end_to_end import lay_out
from tests.verify_kit import forged, lower

LABELS = ["yes", "no", "maybe"]
C = 0.001
WORDS = [
    "fever",
    "cough",
    "clinic",
    "stroke",
    "aspirin",
    "pressure",
    "findings",
    "home",
    "blood",
    "risk",
]
LORA = {"modules": ["gate_proj", "down_proj"], "last_layers": 1, "rank": 4}


def plan(base: Path, digest: str, **changes: Any) -> Study:
    options = {"teacher": str(base), "digest": digest, **changes.pop("options", {})}
    table = {"name": "distill", "max_length": 64, "options": options} | changes.pop("objective", {})
    body = {"base": {"model": str(base)}, "lora": LORA, "objective": table}
    return study(**body | changes)


@pytest.fixture
def text(tiny_base: Path) -> Study:
    return plan(tiny_base, find_base(str(tiny_base)).digest)


def rows(units: int = 8) -> list[dict[str, str]]:
    draw = np.random.default_rng(3)
    return [
        {
            "who": str(unit),
            "q": " ".join(draw.choice(WORDS, 4)) + f" day {unit}",
            "a": " " + " ".join(draw.choice(WORDS, 3)),
        }
        for unit in range(units)
        for _ in range(1 + unit % 2)
    ]


def read(
    folder: Path, made: Study, found: list[dict[str, str]], teach: TeacherFunction | None
) -> Dataset:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    columns = Columns(prompt="q", completion="a", patient="who")
    tokenizer = load(made.base.model).tokenizer
    private = made.model_copy(
        update={"privacy": made.privacy.model_copy(update={"unit": "patient"})}  # type: ignore[union-attr]
    )
    return load_dataset(
        SiteData(path=path, columns=columns), private, tokenizer, soft_targets=teach
    )


def network_of(made: Study) -> Network:
    labels = made.objective.resolved.outputs
    made_network = Network(find_base(made.base.model), torch.float32, made.lora, labels)
    draw = np.random.default_rng(1)
    made_network.load_trainable(
        {
            n: draw.normal(size=a.shape).astype(np.float32) * 0.1
            for n, a in made_network.trainable().items()
        }
    )
    return made_network


def clipped(network: Network, made: Study, data: Dataset) -> torch.Tensor:
    engine = UnitGradientEngine(CachedDataset(network, data), made.objective.resolved)
    each = engine.matrix(range(engine.n_rows)).double()
    return clip.clip(each.float(), C).sum(dim=0).double()


def moved(
    folder: Path, made: Study, teacher: Callable[[list[dict[str, str]]], TeacherFunction], gone: str
) -> float:
    """How far the clipped sum moves, in C, when one unit is removed."""
    network, found = network_of(made), rows()
    less = [row for row in found if row["who"] != gone]
    whole, without = (
        clipped(network, made, read(folder, made, some, teacher(some))) for some in (found, less)
    )
    return float((whole - without).norm()) / C


def test_removing_any_unit_moves_the_sum_by_at_most_c(tmp_path: Path, text: Study) -> None:
    teach = teacher_for(text)
    assert teach is not None
    for gone in ("0", "3", "7"):
        figure = moved(tmp_path, text, lambda _: teach, gone)
        assert 0.5 < figure <= 1 + 1e-3


def fitted(base: Path) -> Callable[[list[dict[str, str]]], TeacherFunction]:
    """The twin: a teacher trained without noise on the very records that it then teaches."""

    def teacher(found: list[dict[str, str]]) -> TeacherFunction:
        model = load(str(base))
        body = model.model.requires_grad_(True)
        step = torch.optim.Adam(body.parameters(), lr=3e-3)
        for _ in range(6):
            for row in found:
                ids = torch.tensor([model.tokenizer.encode(row["q"] + row["a"])])
                loss = body(input_ids=ids, labels=ids).loss
                step.zero_grad()
                loss.backward()
                step.step()
        body.requires_grad_(False)
        digest = find_base(str(base)).digest
        made = plan(base, digest)
        spec = made.objective.resolved.teacher_spec
        assert spec is not None
        return soft_targets_of([model], made.objective, spec)

    return teacher


def test_a_teacher_trained_on_the_records_is_caught(
    tmp_path: Path, tiny_base: Path, text: Study
) -> None:
    assert moved(tmp_path, text, fitted(tiny_base), "3") > 1.5


def test_a_records_targets_are_its_own(tmp_path: Path, text: Study) -> None:
    teach, found = teacher_for(text), rows()
    before = read(tmp_path, text, found, teach)
    other = [row | {"a": " something else."} if row["who"] == "3" else row for row in found]
    after = read(tmp_path, text, other, teach)
    assert before.n_units == after.n_units
    for old, new in zip(before.examples, after.examples, strict=True):
        assert old.soft is not None and new.soft is not None
        assert len(old.soft.tokens) == (old.target_ids != -100).sum()
        same = old.soft.logp.tobytes() == new.soft.logp.tobytes()
        assert same == (found[before.examples.index(old)]["who"] != "3")


def test_the_targets_are_the_teachers_probabilities(tmp_path: Path, text: Study) -> None:
    data = read(tmp_path, text, rows(2), teacher_for(text))
    example = data.examples[0]
    model = load(text.base.model)
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    full = torch.log_softmax(model.model(input_ids=ids).logits[0], dim=1)
    at = np.flatnonzero(example.target_ids != -100)
    assert example.soft is not None
    tokens = torch.from_numpy(example.soft.tokens.astype(np.int64))
    np.testing.assert_allclose(full[at].gather(1, tokens).numpy(), example.soft.logp, atol=1e-4)


@torch.no_grad()
def test_a_student_like_its_teacher_has_no_loss(tmp_path: Path, text: Study) -> None:
    network = Network(find_base(text.base.model), torch.float32, text.lora, 0)  # B is zero
    data = CachedDataset(network, read(tmp_path, text, rows(), teacher_for(text)))
    found = text.objective.resolved
    for batch in data.batches(range(len(data.dataset.examples))):
        assert float(found.losses(network, batch).abs().max()) < 1e-5
    moved_away = network_of(text)
    data = CachedDataset(moved_away, data.dataset)
    for batch in data.batches(range(len(data.dataset.examples))):
        assert float(found.losses(moved_away, batch).min()) > 1e-4


@torch.no_grad()
def test_the_loss_is_the_written_out_divergence(tmp_path: Path, tiny_base: Path) -> None:
    """With every token of the vocabulary, against torch's own KL, one record at a time."""
    digest = find_base(str(tiny_base)).digest
    made = plan(tiny_base, digest, options={"temperature": 2.0, "hard": 0.25})
    spec = made.objective.resolved.teacher_spec
    assert spec is not None
    network, model = network_of(made), load(str(tiny_base))
    teach = soft_targets_of([model], made.objective, replace(spec, top=10_000))
    data = CachedDataset(network, read(tmp_path, made, rows(3), teach))
    teacher = model.model
    for batch in data.batches(range(len(data.dataset.examples))):
        found = made.objective.resolved.losses(network, batch)
        for row, index in enumerate(batch.index.tolist()):
            example = data.dataset.examples[index]
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            at = np.flatnonzero(example.target_ids != -100)
            theirs = torch.log_softmax(teacher(input_ids=ids).logits[0, at] / 2, dim=1)
            logits = network.model(input_ids=ids).logits[0, at]
            ours = torch.log_softmax(logits / 2, dim=1)
            kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
            aims = torch.from_numpy(example.target_ids[at].astype(np.int64))
            true = torch.nn.functional.cross_entropy(logits, aims)
            assert float(found[row]) == pytest.approx(float(0.75 * 4 * kl + 0.25 * true), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "hard": 0.3}])
@pytest.mark.parametrize("engine", ["auto", "opacus"])
def test_the_self_test_passes(tiny_base: Path, options: dict[str, float], engine: str) -> None:
    digest = find_base(str(tiny_base)).digest
    training = {"rounds": 4, "sampling_rate": 1.0, "learning_rate": 0.1, "engine": engine}
    made = plan(tiny_base, digest, options=options, training=training)
    results = selftest.run(made)
    assert [r.name for r in results] == ["parity", "isolation", "sensitivity", "noise"]
    assert all(r.passed for r in results), results


def test_the_self_test_catches_targets_shared_by_a_batch(
    text: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the teacher's figures centred over whoever is in the batch."""

    def centred(
        network: Network,
        batch: Any,
    ) -> torch.Tensor:
        tokens, logp = batch.soft
        mean = torch.log_softmax(logp - logp.mean(dim=0, keepdim=True), dim=2)
        return divergence(network, replace(batch, soft=(tokens, mean)))

    monkeypatch.setattr(Distill, "losses", staticmethod(centred))
    failed = {r.name for r in selftest.run(text) if not r.passed}
    assert {"parity", "isolation"} & failed


def test_classes_are_taught_by_a_run_and_the_student_learns(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    objective = {"name": "classify", "labels": LABELS, "max_length": 64}
    base = {"model": str(tiny_encoder), "digest": find_base(str(tiny_encoder)).digest}
    teacher = study(base=base, lora=None, objective=objective)
    network = Network(find_base(str(tiny_encoder)), torch.float32, None, 3)
    draw = np.random.default_rng(0)
    network.load_trainable(
        {n: draw.normal(size=a.shape).astype(np.float32) for n, a in network.trainable().items()}
    )
    network.save(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "plan.json").write_text(teacher.model_dump_json())
    run = load(tmp_path / "run")
    table = {"labels": LABELS}
    options = {"teacher": str(tmp_path / "run")}
    made = plan(tiny_encoder, run.digest, objective=table, lora=None)
    made = made.model_copy(
        update={
            "objective": made.objective.model_copy(
                update={"options": made.objective.options | options, "labels": tuple(LABELS)}
            )
        }
    )
    assert all(r.passed for r in selftest.run(made))
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"t": r["q"], "y": "no"}) + "\n" for r in rows()))
    file = DataFile(path=path, columns=Columns(text="t", label="y"))
    data = load_dataset(
        SiteData(path=path, columns=file.columns),
        made,
        run.tokenizer,
        soft_targets=teacher_for(made),
    )
    said = [run.scores(e.input_ids) for e in data.examples]
    for example, logits in zip(data.examples, said, strict=True):
        assert example.soft is not None
        expected = torch.log_softmax(logits, dim=0).numpy()
        np.testing.assert_allclose(example.soft.logp[0], expected, atol=1e-5)


# ------------------------------------------------------------------------ whom a site listens to


def of(tmp_path: Path, base: Path, privacy: str) -> tuple[Path, str]:
    """A finished run under `privacy`, and its digest."""
    path = lay_out(tmp_path / "before", base, privacy)
    simulate(path, sorted((tmp_path / "before").glob("site-*.toml")), tmp_path / "teacher")
    return tmp_path / "teacher", load(tmp_path / "teacher").digest


def rules(site: Path, made: Study, policy: dict[str, object]) -> list[str]:
    found = load_site(site)
    loosened = found.policy.model_copy(update={"objectives": ("distill",), **policy})
    assert isinstance(loosened, PolicyTable)
    changed = found.model_copy(update={"policy": loosened})
    return [str(r) for r in refusals(made, changed, None) if "teacher" in str(r)]


@pytest.mark.parametrize("privacy", ['"off"', "{ epsilon = 2.0, delta = 1e-3, unit = 'patient' }"])
def test_a_run_teaches_only_where_a_person_lists_its_digest(
    tmp_path: Path, tiny_base: Path, privacy: str
) -> None:
    """The answer is the same for a run that this machine has and for one that it has not."""
    run, digest = of(tmp_path, tiny_base, privacy)
    base = find_base(str(tiny_base)).digest
    site = tmp_path / "before" / "site-north.toml"
    answers = []
    for asked in (digest, "sha256:" + "7" * 64):
        made = plan(tiny_base, asked, options={"teacher": str(run)})
        found = rules(site, made, {"bases": (base,)})
        assert len(found) == 1 and "policy.teachers" in found[0]
        answers.append(found[0].replace(asked, ""))
        assert rules(site, made, {"bases": (base,), "teachers": (asked,)}) == []
    assert len(set(answers)) == 1


def test_a_base_that_nobody_vouches_for_is_no_teacher(tmp_path: Path, tiny_base: Path) -> None:
    lay_out(tmp_path, tiny_base, '"off"')
    digest = find_base(str(tiny_base)).digest
    made = plan(tiny_base, digest)
    found = rules(tmp_path / "site-north.toml", made, {"bases": "any"})
    assert len(found) == 1 and "never saw this site's records" in found[0]
    seen = review(made, load_site(tmp_path / "site-north.toml"), Ledger(tmp_path / "state-north"))
    assert made.objective.options["digest"] in str(seen.sections)
    for vouched in ({"bases": "any", "teachers": (digest,)}, {"bases": (digest,)}):
        assert rules(tmp_path / "site-north.toml", made, vouched) == []


@pytest.mark.parametrize("listed", [True, False])
def test_no_plan_makes_a_site_load_a_teacher_before_it_is_admitted(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """Its load would show by the time of the answer which models a hospital has."""
    lay_out(tmp_path, tiny_base, '"off"')
    digest = find_base(str(tiny_base)).digest
    teachers = (digest,) if listed else ()
    process_cache.clear("teachers")
    asked = list[object]()
    monkeypatch.setattr(teacher_module, "load", lambda *args, **_: asked.append(args))
    monkeypatch.setattr(teacher_module, "folder_of", lambda spec: asked.append(spec))
    rules(tmp_path / "site-north.toml", plan(tiny_base, digest), {"teachers": teachers})
    assert asked == []
    with suppress(Exception):  # twin: what an admitted plan does
        find_teacher(plan(tiny_base, digest).objective.resolved.teacher_spec)  # type: ignore[arg-type]
    assert asked
    process_cache.clear("teachers")


def test_the_memory_of_a_records_targets_is_bounded_whatever_the_plan_says(
    tmp_path: Path, text: Study, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of targets give what all at once give; a plan keeps 256 next tokens at most."""
    with pytest.raises(ConfigError, match="256"):
        _ = plan(
            tiny_base, find_base(str(tiny_base)).digest, options={"top": 257}
        ).objective.resolved
    whole = read(tmp_path, text, rows(), teacher_for(text))
    held = list[int]()
    honest = torch.Tensor.topk

    def topk(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
        held.append(len(tensor))
        return honest(tensor, *args, **more)

    monkeypatch.setattr(teacher_module, "ROWS", 2)
    monkeypatch.setattr(torch.Tensor, "topk", topk)
    parts = read(tmp_path, text, rows(), teacher_for(text))
    assert max(held) == 2 and len(held) > len(parts.examples)
    for one, other in zip(whole.examples, parts.examples, strict=True):
        assert one.soft is not None and other.soft is not None
        np.testing.assert_array_equal(one.soft.tokens, other.soft.tokens)
        np.testing.assert_allclose(one.soft.logp, other.soft.logp, atol=1e-5)


def test_another_teacher_than_the_plans_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    made = plan(tiny_base, "sha256:" + "0" * 64)
    with pytest.raises(PolicyRefused, match="does not have"):
        teacher_for(made)
    with pytest.raises(ConfigError, match="teacher"):
        _ = made.objective.model_copy(update={"options": {}}).resolved


def test_a_study_distils_a_paid_teacher_into_a_student(tmp_path: Path, tiny_base: Path) -> None:
    """The whole way: a DP run teaches a second DP study at the same sites."""
    process_cache.clear("teachers")
    run, digest = of(tmp_path, tiny_base, "{ epsilon = 2.0, delta = 1e-3, unit = 'patient' }")
    folder = tmp_path / "before"
    path = folder / "study.toml"
    text = path.read_text().replace('name = "causal_lm"', 'name = "distill"')
    text = text.replace('name = "small"', 'name = "student"')
    options = f'[objective.options]\nteacher = "{run}"\ndigest = "{digest}"\n[training]'
    path.write_text(text.replace("[training]", options))
    base = find_base(str(tiny_base)).digest
    for site in folder.glob("site-*.toml"):
        rules = f'[policy]\nobjectives = ["distill"]\nteachers = ["{base}", "{digest}"]'
        site.write_text(site.read_text().replace("[policy]", rules))
    assert load_study(path).objective.name == "distill"
    body = simulate(path, sorted(folder.glob("site-*.toml")), tmp_path / "student")
    assert set(body["sites"].values()) == {"admitted"}
    trained = load_file(tmp_path / "student" / "adapter" / "adapter_model.safetensors")
    assert any(abs(v).max() > 0 for n, v in trained.items() if "lora_B" in n)
    sites = body["privacy"]["sites"]  # each in both studies, and each had ε = 2 for either
    assert all(site["own_epsilon"] <= 2.0 < site["epsilon"] < 4.0 for site in sites.values())
    assert body["privacy"]["epsilon"] == max(site["epsilon"] for site in sites.values())
    assert body["teacher"]["digest"] == digest and body["teacher"]["student_epsilon"] <= 2.0
    assert "both trainings together" in (tmp_path / "student" / "report.md").read_text()
    found = verify(tmp_path / "student")
    assert found.epsilon == body["teacher"]["student_epsilon"]
    assert found.with_teacher == body["privacy"]["epsilon"]
    told = command("verify", tmp_path / "student", "--simulation")
    assert told.exit_code == 0 and "with its teacher's training ε = " in told.output
    with pytest.raises(NotGenuine, match=r"epsilon is 0\.5.* at least"):
        verify(forged(tmp_path / "student", tmp_path, lower))
