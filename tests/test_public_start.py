"""What is made of public text before the first round: bound in the plan, free of ε, reported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedtune.core.config import Study, load_study
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.models.build import build
from fedtune.core.models.lora import digest
from fedtune.core.models.preconditioner import identity_part, separate_frozen
from fedtune.core.registry import process_cache
from fedtune.core.run_folder import load_plan
from fedtune.evaluation.evaluator import Evaluator
from fedtune.officer.site_files import sites_in
from fedtune.public import start as start_module
from fedtune.public import start_cache
from fedtune.public import training as public_module
from fedtune.public.start import start
from fedtune.report.claim import judge_change
from fedtune.server import store
from tests.dp.conftest import study
from tests.simulated import simulate
from tests.test_end_to_end import PRIVATE, lay_out

PUBLIC = """
[public]
path = "public.jsonl"
licence = "CC0"
columns = { prompt = "q", completion = "a" }
"""
TRAINED = 4 * ["trained_on"]  # a step each
START = "[start]\nsteps = 4\nlearning_rate = 5.0\n"
PRECONDITIONER = "[lora.preconditioner]\nrank = 12\n"


@pytest.fixture(autouse=True)
def own_start_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test computed from public text, no other finds."""
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def laid_out(tmp_path: Path, tiny_base: Path) -> Path:
    path = lay_out(tmp_path, tiny_base, PRIVATE)
    path.write_text(path.read_text() + PUBLIC + START + PRECONDITIONER)
    rows = [{"q": f"cough week {n}", "a": "yn"[n % 2]} for n in range(12)]
    (tmp_path / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_whole_run_with_both(laid_out: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = simulate(laid_out, sites_in(tmp_path), out)
    plan = load_plan(out)
    assert plan.lora and plan.lora.preconditioner and plan.start
    progress = store.load(out, load_study(laid_out))
    assert progress is not None
    _, factors = separate_frozen(progress.frozen)
    assert digest(factors) == plan.lora.preconditioner.digest
    assert all(f.shape[1] == 12 and identity_part(f) > 1 for f in factors.values())
    quality = report["quality"]
    assert quality["start"]["loss"] != quality["before"]["loss"]
    assert f"{quality['start']['loss']:.4g}" in (out / "report.md").read_text()
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in saved} == {"lora_A", "lora_B"}  # plain LoRA
    # The saved adapter, in an evaluator that knows no preconditioner, is what was measured.
    evaluator = Evaluator(progress.study, progress.frozen)
    assert evaluator.measure(progress.adapter) == pytest.approx(quality["after"])
    # What the sites' records added is judged against the start, not against the base.
    low, high = quality["gain"]["over_start"]
    assert low <= quality["after"]["loss"] - quality["start"]["loss"] <= high
    assert [low, high] != pytest.approx(quality["gain"]["change"], abs=1e-6)
    assert evaluator.measure(progress.origin) == pytest.approx(quality["start"])
    assert judge_change("loss", [low, high])[1] in (out / "report.md").read_text()


def test_it_costs_no_epsilon_and_is_bound_by_the_digest(laid_out: Path) -> None:
    given = load_study(laid_out)
    made = start(given)
    plain = start(given.changed(start=None, lora={"preconditioner": None}))
    assert plan_for_site(made.study, 20).epsilon == plan_for_site(plain.study, 20).epsilon
    assert made.study.start and made.study.start.digest == digest(made.adapter)
    assert any(array.any() for array in made.adapter.values())
    assert not any(array.any() for array in plain.adapter.values())
    again = start(
        given
    )  # the same to rounding: a library's last digits follow from memory's layout
    assert all(np.allclose(again.adapter[n], a, atol=1e-4) for n, a in made.adapter.items())
    assert made.study.digest != plain.study.digest
    other = start(given.changed(start={"steps": 5}))
    assert other.study.digest != made.study.digest
    evaluator = Evaluator(made.study, made.frozen)
    assert evaluator.measure(made.adapter) != evaluator.measure(plain.adapter)


def test_steps_before_the_first_round_train_what_a_narrow_round_leaves(laid_out: Path) -> None:
    given = load_study(laid_out)
    whole = start(given)
    narrow = start(given.changed(lora={"preconditioner": {"narrow": True}}))
    assert all(np.allclose(narrow.adapter[n], a, atol=1e-4) for n, a in whole.adapter.items())
    assert narrow.study.digest != whole.study.digest
    _, factors = separate_frozen(narrow.frozen)
    assert factors and all(".lora_U." in name for name in factors)


def test_a_run_that_is_resumed_keeps_what_it_started_at(laid_out: Path, tmp_path: Path) -> None:
    report = simulate(laid_out, sites_in(tmp_path), tmp_path / "run")
    again = simulate(laid_out, sites_in(tmp_path), tmp_path / "run", resume=True)
    assert again["quality"]["start"] == report["quality"]["start"]
    assert again["quality"]["before"] == report["quality"]["before"]


# ------------------------------------------------------------------------------------------ heads


def classes(base: Path, **changes: Any) -> Study:
    objective = {"name": "classify", "labels": ["fever", "cough", "rash"], "max_length": 16}
    body: dict[str, Any] = {
        "base": {"model": str(base), "dtype": "float32"}, "lora": None, "objective": objective,
        "start": {"head": "labels", "scale": 5.0},
    }  # fmt: skip
    return study(**(body | changes))


def test_a_head_starts_at_the_classes_names(tiny_encoder: Path) -> None:
    made = start(classes(tiny_encoder))
    weight, bias = made.adapter["head.weight"], made.adapter["head.bias"]
    assert np.allclose(np.linalg.norm(weight, axis=1), 5.0, rtol=1e-5) and not bias.any()
    assert made.study.start and made.study.start.digest == digest(made.adapter)
    described = start(
        classes(
            tiny_encoder,
            start={"head": "labels", "scale": 5.0, "descriptions": {"rash": "red skin"}},
        )
    )
    other = described.adapter["head.weight"]
    assert not np.allclose(weight, other)
    assert described.study.digest != made.study.digest


TEXTS = ("hot since monday", "coughs at night", "hot and cold", "coughs")
ASKED = [0, 1, 0, 1]  # of TEXTS; nobody has a rash


@pytest.fixture
def labelled(tmp_path: Path) -> dict[str, Any]:
    names = ["fever", "cough", "rash"]
    rows = [{"t": t, "l": names[n]} for t, n in zip(TEXTS, ASKED, strict=True)]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "licence": "CC0", "columns": {"text": "t", "label": "l"}}


def test_a_head_starts_at_the_optimum_of_a_regression_on_public_records(
    tiny_encoder: Path, labelled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient is zero there, by torch, from what a network makes of the texts one by one."""
    monkeypatch.setattr(public_module, "PENALTY", 0.01)
    monkeypatch.setattr(start_cache, "load_arrays", lambda key: None)
    process_cache.clear("made from public text")
    named = start(classes(tiny_encoder))
    table = {"head": "public", "scale": 5.0}
    made = start(classes(tiny_encoder, public=labelled, start=table))
    network = build(made.study)
    vectors = []
    for text in TEXTS:
        ids = network.tokenizer(text, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids, dtype=torch.bool)
        vectors.append(network.pool(network.hidden(network.prefix(ids, mask), mask), mask)[0])
    x = torch.stack(vectors).detach().double()
    length = float(x.square().sum(dim=1).mean().sqrt())

    def slope(arrays: Any) -> float:
        now = {n: torch.from_numpy(a).double().requires_grad_() for n, a in arrays.items()}
        logits = x / length @ now["head.weight"].T + now["head.bias"]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ASKED))
        for name, moved in now.items():
            loss = loss + 0.005 * (moved - torch.from_numpy(named.adapter[name])).square().sum()
        loss.backward()
        return max(float(p.grad.abs().max()) for p in now.values() if p.grad is not None)

    unit = made.adapter | {"head.weight": made.adapter["head.weight"] * length}
    assert slope(unit) < 1e-4 < 1e-2 < slope(named.adapter)
    assert made.study.start and made.study.start.digest == digest(made.adapter)
    # A large penalty leaves the head where it was.
    monkeypatch.setattr(public_module, "PENALTY", 1e6)
    process_cache.clear("made from public text")
    held = start(classes(tiny_encoder, public=labelled, start=table))
    near = held.adapter["head.weight"] * length
    assert np.allclose(near, named.adapter["head.weight"], atol=1e-4)


def test_an_adapter_is_preconditioned_under_the_head_that_it_starts_with(
    tiny_encoder: Path, labelled: dict[str, Any]
) -> None:
    """Under a head of zeros no gradient reaches an adapter; each head gives factors of its own."""
    table = {"rank": 4, "damping": 1.0}
    lora = {"rank": 2, "modules": ["query"], "preconditioner": table}

    def factors_of(**begins: Any) -> str:
        plan = classes(tiny_encoder, public=labelled, lora=lora, start=begins)
        return digest(separate_frozen(start(plan).frozen)[1])

    with pytest.raises(ModelError, match="are all zero, or not finite"):
        factors_of(head="zero")
    named = factors_of(head="labels")
    assert named == factors_of(head="labels")
    others = {factors_of(head="public"), factors_of(head="labels", descriptions={"rash": "itch"})}
    assert len({named, *others}) == 3


def test_labels_without_a_head_are_refused(tiny_base: Path) -> None:
    objective = {"name": "causal_lm", "labels": ["fever", "cough"], "max_length": 16}
    plan = classes(tiny_base, objective=objective, lora={"rank": 2, "modules": ["q_proj"]})
    with pytest.raises(ConfigError, match="trains no head"):
        start(plan)


def test_what_does_not_fit_is_refused(tiny_encoder: Path) -> None:
    with pytest.raises(ValueError, match=r"start\.steps"):
        classes(tiny_encoder, start={"steps": 3})
    with pytest.raises(ValueError, match="descriptions"):
        classes(tiny_encoder, start={"head": "labels", "descriptions": {"none": "x"}})
    with pytest.raises(ValueError, match="labels"):
        classes(tiny_encoder, objective={"name": "causal_lm"}, start={"head": "labels"})
    with pytest.raises(ValueError, match=r"\[public\] table of texts with labels"):
        classes(tiny_encoder, start={"head": "public"})


# --------------------------------------------------------------------- computed once in a process


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is computed from public text, as it is."""
    process_cache.clear("made from public text")
    calls: list[str] = []

    def watched(name: str) -> Any:
        real = getattr(start_module, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return real(*arguments)

        return call

    for name in ("public_factor", "output_factors", "trained_on"):
        monkeypatch.setattr(start_module, name, watched(name))
    return calls


def test_it_is_computed_once_for_plans_that_differ_in_what_comes_later(
    laid_out: Path, made: list[str]
) -> None:
    given = load_study(laid_out).changed(lora={"a_init": "public"})
    first = start(given)
    assert made == ["public_factor", "output_factors", *4 * ["trained_on"]]
    later = given.changed(
        training={"learning_rate": 0.01, "rounds": 5}, privacy={"epsilon": 1.0},
        strategy={"min_sites": 2}, wire={"update": "float32"}, study={"name": "another"},
    )  # fmt: skip
    again = start(later)
    assert len(made) == 6
    assert digest(again.adapter) == digest(first.adapter)
    assert digest(again.frozen) == digest(first.frozen)
    assert again.study.lora and first.study.lora
    assert again.study.lora.preconditioner == first.study.lora.preconditioner
    for arrays in (again.adapter, again.frozen):
        for array in arrays.values():
            array += 1.0  # whoever changes its own leaves the others'
    assert digest(start(given).adapter) == digest(first.adapter)


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({"start": {"steps": 3}}, []),  # the first steps of four
        ({"start": {"steps": 6}}, TRAINED[:2]),
        ({"start": {"learning_rate": 4.0}}, TRAINED),
        ({"clipping": {"max_grad_norm": 0.25}}, TRAINED),
        ({"lora": {"preconditioner": {"damping": 0.5}}}, ["output_factors", *TRAINED]),
        ({"lora": {"alpha": 3.0}}, ["public_factor", "output_factors", *TRAINED]),
        ({"study": {"seed": 5}}, ["public_factor", "output_factors", *TRAINED]),
        ({"objective": {"max_length": 24}}, ["public_factor", "output_factors", *TRAINED]),
    ],
)
def test_what_it_depends_on_computes_it_anew(
    laid_out: Path, made: list[str], changes: dict[str, Any], anew: list[str]
) -> None:
    given = load_study(laid_out).changed(lora={"a_init": "public"})
    start(given)
    made.clear()
    start(given.changed(**changes))
    assert made == anew


def test_other_public_text_computes_it_anew(
    laid_out: Path, tmp_path: Path, made: list[str]
) -> None:
    start(load_study(laid_out))
    rows = [{"q": f"cough week {n}", "a": "ny"[n % 2]} for n in range(12)]
    (tmp_path / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.clear()
    start(load_study(laid_out))
    assert "output_factors" in made and "trained_on" in made


# ------------------------------------------------------------------------- kept on this machine


def test_a_start_that_is_broken_off_goes_on_after_its_last_whole_step(
    laid_out: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = load_study(laid_out).changed(lora={"a_init": "public"})
    real = start_module.trained_on

    def stopped(*arguments: Any) -> Any:
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(start_module, "trained_on", stopped)
        with pytest.raises(KeyboardInterrupt):
            start(given)
    assert made == ["public_factor", "output_factors", *TRAINED[:2]]
    made.clear()
    process_cache.clear("made from public text")  # as another process begins
    whole = start(given)
    assert made == TRAINED[2:]
    process_cache.clear("made from public text")
    monkeypatch.setattr(start_cache, "load_arrays", lambda key: None)
    anew = start(given)
    for one, other in ((whole.adapter, anew.adapter), (whole.frozen, anew.frozen)):
        assert all(np.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_what_was_kept_and_damaged_is_computed_again(
    laid_out: Path, tmp_path: Path, made: list[str]
) -> None:
    given = load_study(laid_out)
    first = start(given)
    kept = sorted((tmp_path / "cache" / start_cache.FOLDER).glob("*.safetensors"))
    assert len(kept) == 5 and {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1])
    made.clear()
    process_cache.clear("made from public text")
    again = start(given)
    assert made == ["output_factors", *TRAINED]
    assert all(np.allclose(again.adapter[n], a, atol=1e-4) for n, a in first.adapter.items())


def test_a_disk_that_keeps_nothing_is_no_error(
    laid_out: Path, tmp_path: Path, made: list[str]
) -> None:
    (tmp_path / "cache").write_text("no folder")
    start(load_study(laid_out))
    assert made == ["output_factors", *TRAINED]


def test_what_was_used_longest_ago_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_cache, "MOST_BYTES", 3000)
    for number, key in enumerate("abcd"):
        start_cache.keep(key, {"x": np.zeros(200, np.float32)})
        path = tmp_path / "cache" / start_cache.FOLDER / f"{key}.safetensors"
        os.utime(path, (number, number))
    left = {path.stem for path in path.parent.iterdir()}
    assert left == {"b", "c", "d"}


def test_what_a_plug_in_computes_stays_in_the_process(
    laid_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code may change without a word."""
    monkeypatch.setattr(start_module, "_is_ours", lambda study: False)
    process_cache.clear("made from public text")
    start(load_study(laid_out))
    assert not (tmp_path / "cache" / start_cache.FOLDER).exists()
    given = load_study(laid_out)
    monkeypatch.undo()
    assert start_module._is_ours(given)
    theirs = given.model_copy(
        update={"objective": given.objective.model_copy(update={"name": "their_own"})}
    )
    assert not start_module._is_ours(theirs)
