"""Membership inference on what a study trains, and what ε lets anybody find."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.audit import attack
from fedtune.audit import membership as module
from fedtune.audit.attack import Attack, Secrets, attack_run, attack_study, ratios
from fedtune.audit.membership import (
    auc,
    auc_bound,
    compute_true_positive_rate,
    membership,
    roc,
    tpr_bound,
)
from fedtune.audit.secret import Exposure, most_exposed, most_extracted
from fedtune.core.config import Site, Study, load_site, load_study
from fedtune.core.data.records import read_records
from fedtune.core.dp.calibration import resolve
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.models import preconditioner
from fedtune.core.models.build import build
from fedtune.core.models.lora import Arrays
from fedtune.officer.attack import _held_out, attack_site
from fedtune.public.start import start
from fedtune.runs.run import Run
from fedtune.server.bound import Limits
from fedtune.strategies.discriminant import Discriminant
from tests import chance
from tests.cli_kit import run as command
from tests.simulated import noise_from, simulate
from tests.test_prototypes import PRIVATE, lay_out

# ------------------------------------------------------------------------- the figures


def column(*values: float) -> np.ndarray:
    return np.array([[value] for value in values], dtype=float)


def test_the_area_and_the_share_that_is_found() -> None:
    assert auc(column(3, 2), column(1, 0)) == 1.0
    assert auc(column(1, 1), column(1, 1)) == 0.5
    assert auc(column(2, 0), column(1)) == 0.5
    others = column(*range(100))
    assert (
        compute_true_positive_rate(column(99, 98.5, 98, 200), others) == 0.75
    )  # above the highest but one
    assert compute_true_positive_rate(column(98), others) == 0.0
    points = roc(column(3, 1), column(2, 0))
    assert points[0] == (0.0, 0.0) and points[-1] == (1.0, 1.0)
    assert points == sorted(points)


def test_guessing_is_called_guessing_and_stays_within_any_epsilon() -> None:
    draw = np.random.default_rng(0)  # a seed: the same scores each time, here and below
    told = membership(draw.normal(size=(400, 1)), draw.normal(size=(400, 1)), 0.1, 1e-6)
    low, high = told.auc[1:]
    assert low < 0.5 < high and not told.contradicts


@pytest.mark.parametrize("others", [10, 50])
@pytest.mark.parametrize("guesses", [1, 4])
def test_few_held_out_units_are_no_false_alarm(
    others: int, guesses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members and others of one distribution, several guesses about a unit being one: the threshold
    that 1 % of so few others pass is passed by about 1 / (others + 1) of everybody."""
    monkeypatch.setattr(module, "RESAMPLES", 60)
    draw, alarms = np.random.default_rng(others), 0
    for seed in range(200):
        inside, outside = draw.normal(size=(300, 1)), draw.normal(size=(others, 1))
        same = (np.repeat(scores, guesses, axis=1) for scores in (inside, outside))
        alarms += membership(*same, 0.5, 1e-5, seed).contradicts
    assert alarms <= 10  # 5 %


def test_a_share_of_members_beyond_epsilon_is_caught_where_the_area_is_not() -> None:
    """A tenth of the members stand out, which an ε of 1 allows to no 1 % of false alarms."""
    draw = np.random.default_rng(5)
    inside, outside = draw.normal(size=(2000, 1)), draw.normal(size=(2000, 1))
    inside[:200] += 20
    told = membership(inside, outside, 1.0, 1e-5)
    assert told.auc[1] < told.auc_bound and told.contradicts
    assert told.tpr_bound < told.surely_allowed < told.surely_found < told.tpr[0]


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_the_bound_is_that_of_randomised_response(epsilon: float) -> None:
    """Who says the truth with e^ε / (1 + e^ε) is exactly ε-DP, and on the bound at one point."""
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    alarms = 1 - truth
    assert tpr_bound(alarms, epsilon, 0.0) == pytest.approx(truth)
    assert auc_bound(epsilon, 0.0) == pytest.approx(truth, abs=1e-3)
    assert auc_bound(0.0, 0.0) == pytest.approx(0.5, abs=1e-3)
    assert auc_bound(50.0, 1e-5) == pytest.approx(1.0, abs=1e-3) and tpr_bound(0.0, 9, 1e-3) == 1e-3


def test_a_mechanism_with_more_than_it_claims_is_caught() -> None:
    """The twin: randomised response of ε = 3 that claims 0.5."""
    truth, draw = math.exp(3) / (1 + math.exp(3)), np.random.default_rng(1)
    inside = (draw.random((600, 1)) < truth).astype(float)
    outside = (draw.random((600, 1)) >= truth).astype(float)
    assert membership(inside, outside, 0.5, 0.0).contradicts
    assert not membership(inside, outside, 3.0, 0.0).contradicts


def test_a_ratio_is_high_where_the_model_saw_it() -> None:
    coins = np.array([[True, False], [True, False], [False, True], [False, True]])
    losses = np.where(coins, 1.0, 2.0) + np.random.default_rng(2).normal(size=(4, 2)) * 0.01
    scores = ratios(losses, coins)
    assert scores[coins].min() > scores[~coins].max()


# Of eight models: the deviation that one canary adds to the area, and how far the area lies from ½
# where a canary's own model is scored with one reference less (measured over 700 draws: 0.26 and
# 0.29, and 0.0255, within 0.0002).
ONE_CANARY, SHIFT = 0.3, 0.025
CANARIES = chance.draws_of_mean(SHIFT / ONE_CANARY)


def guessing() -> bool:
    """Whether scores of losses that do not depend on who was there are no better than a coin."""
    draw, half = np.random.default_rng(), np.arange(8) < 4
    coins = np.stack([draw.permutation(half) for _ in range(CANARIES)], axis=1)
    scores = ratios(draw.normal(size=(8, CANARIES)), coins)
    room = chance.deviations() * ONE_CANARY / math.sqrt(CANARIES)
    return abs(auc(scores[coins], scores[~coins]) - 0.5) < room


def test_a_models_own_side_does_not_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one reference less there, and a mean of fewer is further from any loss; its twin is
    scored by all references that there are."""
    assert guessing()
    monkeypatch.setattr(attack, "_draw_models", lambda mask, kept, draw: mask)
    assert not guessing()


# ------------------------------------------------------------------------- anywhere


def tables(base: Path, **changes: Any) -> Study:
    fields: dict[str, Any] = {
        "study": {"name": "attacked"},
        "base": {"model": str(base), "dtype": "float32"},
        # Wide enough that every canary stands out without noise.
        "lora": {"rank": 16, "last_layers": 4},
        "objective": {"name": "causal_lm", "max_length": 64},
        "training": {"rounds": 8, "sampling_rate": 1.0, "learning_rate": 2.0},
        "clipping": {"max_grad_norm": 1.0},
        "privacy": {"epsilon": 1.0, "delta": 1e-3, "unit": "record"},
    }
    return Study.model_validate_json(json.dumps(fields | changes))


def attack_it(base: Path, out: Path | None = None) -> Attack:
    """With the coins of one draw: without noise everything is the same each time."""
    real = np.random.default_rng
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda *seed: real(*(seed or (0,))))
        return attack_study(tables(base), out, canaries=24, models=8, units=30)


@pytest.fixture(scope="module")
def attacked(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Attack, Path]:
    out = tmp_path_factory.mktemp("attack")
    with noise_from(0):
        return attack_it(tiny_base, out), out


def test_without_noise_the_attack_succeeds_and_with_noise_epsilon_bounds_it(
    attacked: tuple[Attack, Path],
) -> None:
    result, out = attacked
    assert result.succeeds and result.twin.auc[1] > 0.9
    assert not result.private.contradicts and result.private.auc[1] < result.private.auc_bound
    assert 0.9 < result.epsilon <= 1.0 and result.twin.auc_bound == 1.0
    facts = json.loads((out / "attack.json").read_text())
    assert facts["twin"]["auc"][0] == result.twin.auc[0]
    assert (out / "attack.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_tells_more_of_planted_secrets_without_noise(attacked: tuple[Attack, Path]) -> None:
    found = attacked[0].secrets
    assert found is not None and not found.contradicts
    # One model's mean of eight secrets is random by half a bit, so the private one is held to ε's
    # bound alone.
    assert found.twin.mean > found.twin.base
    assert found.private.mean < found.allowed < 7 and found.extractable < 2e-3


def test_secrets_beyond_epsilon_are_caught() -> None:
    """The twin of both bounds: exposed and written, where ε allows neither."""
    known = Exposure(8, 128, mean=7.0, highest=7.0, base=1.4, chance=1.4, limit=3.5, extracted=0)
    assert known.chance < most_exposed(known, 0.0, 0.0) <= known.limit  # of guessing
    for epsilon, delta, written, caught in (
        *((1.0, 1e-5, 0, True), (8.0, 1e-5, 0, False)),  # ε = 8 allows all 7 bits,
        *((8.0, 1e-6, 1, True), (8.0, 1e-3, 1, False)),  # and no number to be written
    ):
        found = replace(known, extracted=written)
        bounds = most_exposed(found, epsilon, delta), most_extracted(epsilon, delta)
        assert Secrets(found, found, *bounds).contradicts == caught


@pytest.mark.long  # by default: a mechanism with more than it claims, above
def test_a_loop_that_forgets_its_noise_is_caught(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: noise is logged and not added."""
    from fedtune.core.dp import noise

    monkeypatch.setattr(
        noise, "gaussian_on_grid", lambda size, *_: torch.zeros(size, dtype=torch.int64)
    )
    assert attack_it(tiny_base).private.contradicts


def test_a_study_without_privacy_has_nothing_to_attack(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="no ε to attack"):
        attack_study(tables(tiny_base, privacy="off", clipping=None))


@pytest.mark.parametrize(
    "options", [{"canaries": 30, "units": 29}, {"canaries": 0}, {"models": 7}], ids=str
)
def test_what_cannot_say_anything_is_refused_first(
    tiny_base: Path, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attack, "build", None)
    with pytest.raises(ConfigError, match="expected at least"):
        attack_study(tables(tiny_base), **options)  # type: ignore[arg-type]


@pytest.fixture
def public(tiny_base: Path, tmp_path: Path) -> Study:
    """A study that starts from public text and moves as its coordinator's strategy says."""
    rows = [{"q": f"cough week {n}", "a": "yn"[n % 2]} for n in range(12)]
    (tmp_path / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "q", "completion": "a"}
    given = {"path": str(tmp_path / "public.jsonl"), "licence": "CC0", "columns": columns}
    lora = {"rank": 4, "last_layers": 2, "train": "AB", "preconditioner": {"rank": 12}}
    return tables(
        tiny_base,
        lora=lora,
        public=given,
        start={"steps": 2, "learning_rate": 5.0},
        training={"rounds": 3, "sampling_rate": 1.0, "learning_rate": 0.5},
        strategy={"options": {"momentum": 0.5, "server_learning_rate": 2.0}},
    )


@pytest.mark.long
def test_models_start_and_step_as_the_studys_do(
    public: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = start(public), list[tuple[Arrays, Arrays]]()
    real, network = attack.local_round, build(public)

    def spy(*args: Any) -> Arrays:
        assert (
            network.preconditioner.keys() == preconditioner.separate_frozen(made.frozen)[1].keys()
        )
        seen.append((args[5], real(*args)))
        return seen[-1][1]

    monkeypatch.setattr(attack, "local_round", spy)
    before = {name: array + 1 for name, array in network.zero().items()}
    network.load_trainable(before)  # what another use of the network left there
    attack_study(made.study, canaries=10, models=8, units=20)
    assert all(np.array_equal(network.trainable()[n], a) for n, a in before.items())
    assert len(seen) == 2 * 8 * 3
    _, factors = preconditioner.separate_frozen(made.frozen)
    for first in range(0, len(seen), 3):
        (at, one), (second, two), (third, _) = seen[first : first + 3]
        assert all(np.allclose(at[n], made.adapter[n], atol=1e-4) for n in at)
        step = {n: 2.0 * one[n].astype(np.float64) for n in one}
        expected = preconditioner.move_adapter(at, step, factors)
        assert all(np.allclose(second[n], expected[n], atol=1e-6) for n in at)
        step = {n: 2.0 * (0.5 * one[n].astype(np.float64) + two[n]) for n in one}
        expected = preconditioner.move_adapter(second, step, factors)
        assert all(np.allclose(third[n], expected[n], atol=1e-6) for n in at)


def test_models_of_class_statistics_are_made_as_the_studys_are(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strategy knows the public records, and is told the noise that a round tells it. A basis
    that another machine rounded otherwise, so that the plan has another digest, does not matter."""
    study = load_study(lay_out(tmp_path, tiny_encoder, PRIVATE, rounds=2))
    elsewhere = study.objective.model_copy(update={"basis_digest": f"sha256:{64 * '0'}"})
    told, real = list[tuple[float, float]](), Discriminant.describe_round

    def listen(self: Discriminant, units: float, deviation: float) -> None:
        told.append((units, deviation))
        real(self, units, deviation)

    monkeypatch.setattr(Discriminant, "describe_round", listen)
    result = attack_study(
        study.model_copy(update={"objective": elsewhere}), canaries=10, models=8, units=20
    )
    expected = Limits(study, resolve).deviation(20)  # as a coordinator computes it
    assert told == 16 * [(20, pytest.approx(expected))] + 16 * [(20, 0.0)] and expected > 0
    assert result.rounds == 2 and result.secrets is None


def test_without_the_public_text_nothing_is_attacked(public: Study) -> None:
    assert public.public and public.public.path
    public.public.path.unlink()
    with pytest.raises(ConfigError, match="public text, which cannot be read here"):
        attack_study(public)


@pytest.mark.long
def test_a_finished_run_is_attacked_from_where_it_started(signed: Any, tmp_path: Path) -> None:
    folder, _ = signed
    result = attack_run(Run(folder), tmp_path / "x", canaries=10, models=8, units=20)
    assert result.study == "tiny" and not result.private.contradicts
    done = command(
        *("attack", folder, "--out", tmp_path / "y"),
        *("--canaries", 10, "--models", 8, "--units", 20),
    )
    assert done.exit_code == 0, done.output
    assert "canaries, with noise: area under the curve" in done.output
    assert "ε allows" in done.output and "planted secrets: exposure" in done.output


# ------------------------------------------------------------------------- at a site


STUDY = """
privacy = "off"
[study]
name = "by-heart"
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
"""
SITE = """
[site]
name = "{name}"
declared_size = 16
[data]
path = "data.jsonl"
[data.columns]
prompt = "text"
completion = "answer"
[policy]
bases = "any"
allow_privacy_off = true
"""


@pytest.fixture(scope="module")
def learnt_by_heart(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without privacy that learnt random letters, and other letters."""
    folder = tmp_path_factory.mktemp("by-heart")
    (folder / "study.toml").write_text(STUDY.format(base=tiny_base))
    for number, name in enumerate(("north", "south")):
        (folder / name).mkdir()
        (folder / name / "site.toml").write_text(SITE.format(name=name))
        rows(folder / name / "data.jsonl", number, 12)
    rows(folder / "others.jsonl", 9, 24)
    sites = [folder / name / "site.toml" for name in ("north", "south")]
    simulate(folder / "study.toml", sites, folder / "run")
    return folder


def rows(path: Path, seed: int, number: int) -> None:
    draw = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lines = [
        {"text": f"Ward {n}:", "answer": " " + "".join(draw.choice(letters, 20))}
        for n in range(number)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_site_tells_its_own_from_others_where_nothing_protects_them(
    learnt_by_heart: Path, tmp_path: Path
) -> None:
    site = load_site(learnt_by_heart / "north" / "site.toml")
    found_ = attack_site(
        Run(learnt_by_heart / "run"), site, learnt_by_heart / "others.jsonl", out=tmp_path / "out"
    )
    assert found_.membership.auc[0] > 0.8 and found_.epsilon is None
    assert (tmp_path / "out" / "attack.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out" / "attack.png").stat().st_mode & 0o777 == 0o600
    assert not list((learnt_by_heart / "run").glob("attack*"))


def test_the_command_at_a_site(
    learnt_by_heart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    site = learnt_by_heart / "north" / "site.toml"
    nothing = command("attack", learnt_by_heart / "run", "--site", site)
    assert nothing.exit_code == 2 and "--held-out" in nothing.stderr
    done = command(
        *("attack", learnt_by_heart / "run", "--site", site),
        *("--held-out", learnt_by_heart / "others.jsonl", "--json"),
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["membership"]["members"] == 12
    assert "private to this site" in done.stderr and "Ward" not in done.output
    alone = command("attack", learnt_by_heart / "run", "--held-out", "others.jsonl")
    assert alone.exit_code == 2 and "--site" in alone.stderr
    public = command("attack", learnt_by_heart / "run")
    assert public.exit_code == 2 and "no ε to attack" in public.stderr


def test_a_sites_database_is_compared_with_a_file(tmp_path: Path) -> None:
    """The file is read as a file: the database's table and source are none of it."""
    rows(tmp_path / "others.jsonl", 7, 3)
    (tmp_path / "site.toml").write_text(
        SITE.format(name="north").replace(
            'path = "data.jsonl"', 'url = "sqlite:///clinic.db"\nsource = "sql"'
        )
        + '[data.options]\ntable = "notes"\n'
    )
    held_out = _held_out(load_site(tmp_path / "site.toml"), tmp_path / "others.jsonl")
    records, _ = read_records(held_out, unit="record")
    assert len(records) == 3


def test_too_few_say_nothing(learnt_by_heart: Path, tmp_path: Path) -> None:
    rows(tmp_path / "few.jsonl", 900, 5)
    site: Site = load_site(learnt_by_heart / "north" / "site.toml")
    with pytest.raises(DataError, match="at least 10"):
        attack_site(Run(learnt_by_heart / "run"), site, tmp_path / "few.jsonl")
    assert load_study(learnt_by_heart / "study.toml").study.name == "by-heart"
