"""Preferences made at the site: each record's own, whoever else is in the file."""

from __future__ import annotations

import copy
import json
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file
from tokenizers.processors import TemplateProcessing

from fedtune.core.config import Columns, DataFile, load_study
from fedtune.core.data.tokenize import prompt_ids
from fedtune.core.errors import ConfigError, DataError, Refused
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.loaded import LoadedModel, load
from fedtune.core.registry import process_cache
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.run_folder import is_exported
from fedtune.derive import lineage
from fedtune.derive.distill import distill
from fedtune.derive.label import _file_and_exclusion
from fedtune.derive.lineage import require_private
from fedtune.derive.merge import load_parent, merge_runs
from fedtune.derive.preferences import (
    VerdictJudge,
    load_generator,
    load_judge,
    prompt_template,
    write_preferences,
)
from fedtune.derive.settings import LabelSettings
from fedtune.officer.withdraw import withdraw
from fedtune.public.start import start
from fedtune.runs import teacher_admission
from fedtune.runs.run import Run
from tests.client.hospital_kit import load as load_hospital_sites
from tests.simulated import simulate
from tests.test_cli import run
from tests.test_end_to_end import lay_out

FAST = LabelSettings(new_tokens=6, max_length=256)
ROWS = [
    {"who": "ann", "q": "The patient was seen with fever."},
    {"who": "bob", "q": "Does aspirin lower the risk of stroke?"},
    {"who": "bob", "q": "Blood pressure 120 over 80."},
    {"who": "cid", "q": "Discharged home with paracetamol."},
    {"who": "dee", "q": "No acute findings in the clinic."},
]


def jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records(folder: Path, rows: list[dict[str, str]] = ROWS) -> DataFile:
    path = jsonl(folder / "records.jsonl", rows)
    return DataFile(path=path, columns=Columns(prompt="q", patient="who"))


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> LoadedModel:
    return load_generator(str(tiny_base))


class Noting:
    """A judge, and what it said of each prompt."""

    def __init__(self, judge: VerdictJudge) -> None:
        self.judge, self.said = judge, dict[str, float]()

    def margin(self, prompt: str, first: str, second: str) -> float:
        self.said[prompt] = self.judge.margin(prompt, first, second)
        return self.said[prompt]


def others(folder: Path, judge: VerdictJudge, rows: list[dict[str, str]]) -> list[Any]:
    """What is written of everybody but bob: each line's bytes, and the judge's margin."""
    noting, out = Noting(judge), folder / "out.jsonl"
    write_preferences(records(folder, rows), out, judge.model, noting, FAST)
    found = [(line, json.loads(line)) for line in out.read_bytes().splitlines()]
    return [(line, noting.said[row["prompt"]]) for line, row in found if row["patient"] != "bob"]


CHANGES = {
    "altered": [ROWS[0], *[{"who": "bob", "q": f"Something else: {n}."} for n in "12"], *ROWS[3:]],
    "fewer": [*ROWS[:2], *ROWS[3:]],
    "more": [{"who": "bob", "q": "At the front: a cough."}, *ROWS],
    "none": [ROWS[0], *ROWS[3:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_units_records_change_no_byte(
    tmp_path: Path, model: LoadedModel, change: str
) -> None:
    before = others(tmp_path, VerdictJudge(model), ROWS)
    assert len(before) == 3
    assert others(tmp_path, VerdictJudge(model), CHANGES[change]) == before


class FewShot(VerdictJudge):
    """The twin: the judge is shown what it judged before, whoever's it was."""

    before = ""

    def _odds(self, prompt: str, a: str, b: str) -> float:
        found = super()._odds(FewShot.before + prompt, a, b)
        FewShot.before = prompt + a + b
        return found


def test_a_few_shot_from_the_unit_before_is_caught(tmp_path: Path, model: LoadedModel) -> None:
    seen = []
    for rows in (ROWS, CHANGES["altered"]):
        FewShot.before = ""
        seen.append(others(tmp_path, FewShot(model), rows))
    assert seen[0] != seen[1]


def test_what_a_place_is_worth_cancels(model: LoadedModel) -> None:
    """The tiny judge, as any, likes one of the letters; asked in both orders it is fair."""
    judge = VerdictJudge(model)
    one, two = " No acute findings.", " Fever, a cough."
    assert judge._odds("Why?", one, one) != 0
    assert judge.margin("Why?", one, one) == 0
    assert judge.margin("Why?", one, two) == -judge.margin("Why?", two, one) != 0


@pytest.mark.parametrize("starts", [False, True])
def test_a_base_that_was_tuned_to_chat_is_asked_in_its_own_chat(
    model: LoadedModel, starts: bool
) -> None:
    """starts: the tokenizer puts a start token in front of whatever it reads, as the chat does."""
    tokenizer: Any = copy.deepcopy(model.tokenizer)
    if starts:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
        )
    asked = "Does aspirin lower the risk of stroke?"
    turn = [{"role": "user", "content": asked}]
    whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    settings = LabelSettings(template=prompt_template(replace(model, tokenizer=tokenizer)))
    ids = prompt_ids(asked, settings.objective, tokenizer)
    assert ids == tokenizer.encode(whole, add_special_tokens=False)  # one start token, not two


@pytest.mark.long
def test_labels_carry_the_unit_and_train_as_dpo(tmp_path: Path, tiny_base: Path) -> None:
    study = lay_out(tmp_path, tiny_base, '{ epsilon = 8.0, delta = 1e-3, unit = "patient" }')
    for name in ("north", "south"):
        site = tmp_path / f"site-{name}.toml"
        out = tmp_path / f"{name}-pairs.jsonl"
        told = run(
            "label", site, "--out", out, "--generator", tiny_base, "--new-tokens", "5"
        )  # fmt: skip
        assert told.exit_code == 0, told.output
        assert 'patient = "patient"' in told.output
        assert 'template = "' in told.output  # of the chat, for the study
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert {row["patient"] for row in rows} == {str(i) for i in range(20)}
        assert all(set(row) == {"prompt", "chosen", "rejected", "patient"} for row in rows)
        text = site.read_text().replace(f"{name}.jsonl", f"{name}-pairs.jsonl")
        columns = 'prompt = "prompt", chosen = "chosen", rejected = "rejected", patient = "patient"'
        site.write_text(text.replace('prompt = "q", completion = "a", patient = "who"', columns))
    text = study.read_text().replace('name = "causal_lm"', 'name = "dpo"')
    study.write_text(text[: text.index("[evaluation]")])
    body = simulate(study, sorted(tmp_path.glob("site-*.toml")), tmp_path / "run")
    assert body["privacy"]["epsilon"] <= 8.0
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(abs(value).max() > 0 for name, value in trained.items() if "lora_B" in name)


def test_who_withdrew_from_a_hospital_is_left_out_at_each_membership(tmp_path: Path) -> None:
    """Also where no study has run yet, so that the membership has no state folder."""
    sites = load_hospital_sites(tmp_path / "home")
    assert not any(_file_and_exclusion(site)[1]("p5") for site in sites.values())
    withdraw(sites["cardio"], "p5", Ledger(tmp_path / "home"))
    for site in sites.values():
        assert not site.site.state.exists()
        excluded = _file_and_exclusion(site)[1]
        assert excluded("p5") and not excluded("p6")


def test_who_withdrew_is_left_out(tmp_path: Path, tiny_base: Path) -> None:
    lay_out(tmp_path, tiny_base, '{ epsilon = 8.0, delta = 1e-3, unit = "patient" }')
    (tmp_path / "gone").write_text("3\n")
    Ledger(tmp_path / "state-north")
    assert run("withdraw", tmp_path / "site-north.toml", "--file", tmp_path / "gone").exit_code == 0
    out = tmp_path / "pairs.jsonl"
    told = run(
        "label", tmp_path / "site-north.toml", "--out", out, "--generator", tiny_base,
        "--new-tokens", "3",
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    units = {json.loads(line)["patient"] for line in out.read_text().splitlines()}
    assert "3" not in units and "4" in units


def test_the_same_seed_writes_the_same_and_another_does_not(
    tmp_path: Path, model: LoadedModel
) -> None:
    def written(seed: int) -> bytes:
        settings = LabelSettings(new_tokens=6, max_length=256, seed=seed)
        write_preferences(
            records(tmp_path), tmp_path / "out.jsonl", model, VerdictJudge(model), settings
        )
        return (tmp_path / "out.jsonl").read_bytes()

    assert written(0) == written(0) != written(1)


def test_another_digest_is_refused_before_anything_is_read(tmp_path: Path, tiny_base: Path) -> None:
    told = run(
        "label", tmp_path / "nothing.jsonl", "--column", "prompt=q", "--generator", tiny_base,
        "--generator-digest", "sha256:" + "0" * 64, "--out", tmp_path / "x.jsonl",
    )  # fmt: skip
    assert told.exit_code == 2
    assert "digest" in told.output and not (tmp_path / "x.jsonl").exists()


def test_a_run_without_privacy_neither_writes_nor_judges(tmp_path: Path, tiny_base: Path) -> None:
    study = lay_out(tmp_path, tiny_base, '"off"')
    simulate(study, sorted(tmp_path.glob("site-*.toml")), tmp_path / "run")
    for use in (load_generator, load_judge):
        with pytest.raises(Refused, match='privacy = "off"'):
            use(str(tmp_path / "run"))


def test_what_the_runs_cost_that_wrote_and_judged_is_stated(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Twin: a base costs nothing."""
    study = lay_out(tmp_path, tiny_base, "{ epsilon = 2.0, delta = 1e-3, unit = 'patient' }")
    simulate(study, sorted(tmp_path.glob("site-*.toml")), tmp_path / "run")
    path = jsonl(tmp_path / "records.jsonl", ROWS[:2])
    by = "--column", "prompt=q", "--new-tokens", "4"
    spent = Run(tmp_path / "run").report["privacy"]["epsilon"]
    for number, (source, roles) in enumerate(
        (((tmp_path / "run"), ("generator", "judge")), (tiny_base, ()))
    ):
        out = tmp_path / f"made-{number}.jsonl"
        made = run("label", path, "--out", out, "--generator", source, *by)
        about = json.loads((tmp_path / f"{out.name}.about.json").read_text())
        costs = about.get("costs", {})
        stated = {role: cost["epsilon"] for role, cost in costs.items()}
        assert stated == dict.fromkeys(roles, spent)
        for role in ("generator", "judge"):
            words = f"the {role} is the run small, which cost ε = {rounded_up(spent)}"
            assert (words in made.output) is (role in roles), made.output


def test_a_merged_run_with_a_parent_without_privacy_neither_writes_nor_judges(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Whichever parent comes first, whose plan it has. Twin: both parents are private."""
    private = "{ epsilon = 2.0, delta = 1e-3, unit = 'patient' }"
    parents = dict[str, Run]()
    for name, privacy in (("first", private), ("second", private), ("open", '"off"')):
        study = lay_out(tmp_path / name, tiny_base, privacy)
        simulate(study, sorted(study.parent.glob("site-*.toml")), study.parent / "run")
        process_cache.clear("workers")
        parents[name] = Run(study.parent / "run")

    def merged(*names: str) -> str:
        out = tmp_path / "-".join(names)
        return str(merge_runs([parents[name] for name in names], out, measure=False).folder)

    for order in (("first", "open"), ("open", "first")):
        folder = merged(*order)
        for use in (load_generator, load_judge):
            with pytest.raises(Refused, match="privacy"):
                use(folder)
    assert load_generator(merged("first", "second")).study is not None


@pytest.mark.parametrize("template", ["no place", "{text} {text}"])
def test_a_template_without_one_place_for_the_prompt_is_refused(
    tmp_path: Path, model: LoadedModel, template: str
) -> None:
    out, settings = tmp_path / "out.jsonl", replace(FAST, template=template)
    with pytest.raises(ConfigError, match=r"\{text\} exactly once"):
        write_preferences(records(tmp_path), out, model, VerdictJudge(model), settings)
    assert not out.exists()


def test_nothing_is_left_where_nothing_comes_out(tmp_path: Path, model: LoadedModel) -> None:
    out = tmp_path / "out.jsonl"
    tight = LabelSettings(new_tokens=250, max_length=251)
    with pytest.raises(DataError, match="5 too long"):
        write_preferences(records(tmp_path), out, model, VerdictJudge(model), tight)
    with pytest.raises(ConfigError, match="no prompt"):
        text = DataFile(path=tmp_path / "records.jsonl", columns=Columns(text="q"))
        write_preferences(text, out, model, VerdictJudge(model), FAST)
    assert not out.exists()


def test_an_exported_model_is_neither_base_nor_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights were trained by a run whose report is not its own. As generator, judge and base
    of a student it is refused, and as a teacher its cost is not known. Twin: the same folder
    without the report is a base."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in ("config.json", "report.json"):
        (folder / name).write_text("{}")
    model: Any = SimpleNamespace(study=None, digest="sha256:1", base=SimpleNamespace(path=folder))
    prompts: Any = None  # not read
    study: Any = SimpleNamespace(
        objective=SimpleNamespace(
            resolved=SimpleNamespace(teacher_spec=SimpleNamespace(name="t", digest="sha256:1"))
        )
    )
    monkeypatch.setattr(teacher_admission, "folder_of", lambda spec: folder)
    monkeypatch.setattr(teacher_admission, "verify", lambda source: ("t", "sha256:1"))

    def describe() -> tuple[bool, str]:
        with suppress(Refused):
            require_private(model, "judge", str(folder))
            return True, str((teacher_admission.describe_teacher(study) or {})["kind"])
        return False, str((teacher_admission.describe_teacher(study) or {})["kind"])

    assert describe() == (False, "unknown")
    with pytest.raises(ConfigError, match="is an exported model"):
        distill([], prompts, tmp_path / "out", student=str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell leaves the ~ of --generator=~/model
    assert is_exported(Path("~/exported"))
    (folder / "report.json").unlink()
    assert describe() == (True, "base")


def test_an_exported_model_is_no_base_of_a_study(tmp_path: Path, tiny_base: Path) -> None:
    """A run trained it, whose cost is not in the study's ε. Twin: its weights alone are a base."""
    model = shutil.copytree(tiny_base, tmp_path / "model")
    plan = lay_out(tmp_path / "study", model, "{ epsilon = 3.0, delta = 1e-3, unit = 'patient' }")
    start(load_study(plan))
    (model / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an exported model"):
        start(load_study(plan))


def test_a_run_on_an_exported_model_is_private_for_nothing(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier code trained such runs: what their base cost is in no report of theirs. None is a
    judge, a generator or a parent, and a teacher's cost is not known. Twin: the same run while its
    base is no exported model."""
    model = shutil.copytree(tiny_base, tmp_path / "model")
    folder = tmp_path / "study"
    plan = lay_out(folder, model, "{ epsilon = 3.0, delta = 1e-3, unit = 'patient' }")
    run = tmp_path / "run"
    simulate(plan, sorted(folder.glob("site-*.toml")), run)
    digest = load(run).digest
    study: Any = SimpleNamespace(
        objective=SimpleNamespace(
            resolved=SimpleNamespace(teacher_spec=SimpleNamespace(name="t", digest=digest))
        )
    )
    monkeypatch.setattr(teacher_admission, "folder_of", lambda spec: run)

    uses: list[Callable[[], Any]] = [
        lambda: load_generator(str(run)),
        lambda: lineage.parent(Run(run), load(run), "teacher"),
        lambda: load_parent(Run(run)),
    ]
    for use in uses:
        use()
    assert (teacher_admission.describe_teacher(study) or {})["kind"] == "run"
    (model / "report.json").write_text("{}")
    for use in (*uses, lambda: load_judge(str(run))):
        with pytest.raises(Refused, match="whose base, model, is an exported model"):
            use()
    assert (teacher_admission.describe_teacher(study) or {})["kind"] == "unknown"
