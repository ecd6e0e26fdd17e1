"""`fedtune personalise`: on whom it trains, who can open the result; nothing hands it on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

import fedtune
from fedtune.core.config import Columns, ObjectiveTable, PublicTable, load_site
from fedtune.core.data.records import unit_member
from fedtune.core.errors import ConfigError, DataError, FedtuneError, InputError
from fedtune.core.ledger.audit_log import verify as verify_log
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.build import build
from fedtune.evidence.personal import HEADER, MARK, NeverLeaves, is_sealed
from fedtune.evidence.verify import check_signed
from fedtune.homes.known_homes import check_home
from fedtune.officer.acceptance.accept import accept, read_record, tell
from fedtune.officer.acceptance.records import TRAINED
from fedtune.officer.personalise import personalise as personalising
from fedtune.officer.personalise import records
from fedtune.officer.personalise.fit import Fit, Grid, bound_gain, choose
from fedtune.officer.personalise.personalise import Personal, personalise
from fedtune.officer.personalise.records import HELD_OUT, WITHDREW, read_own
from fedtune.officer.purge import listing, purge
from fedtune.officer.withdraw import withdraw
from fedtune.runs import personal
from fedtune.runs.personal import PersonalRun, open_personal, personal_file
from fedtune.runs.run import Run
from fedtune.runs.teacher_admission import register_teacher
from tests.cli_kit import run as command
from tests.guarantee.search import Finder, forms
from tests.heads_kit import CAUSAL_LORA, CLASSIFY, LABELS, made_run

SITE = """
[site]
name = "north"
declared_size = 40
state = "state"
[data]
path = "data.jsonl"
columns = { text = "note", label = "class", patient = "who" }
[acceptance]
path = "held.jsonl"
columns = { text = "note", label = "class", patient = "who" }
thresholds = { accuracy = 0.1 }
"""
KEY = "Zaphod-Beeblebrox-1979"  # a patient's, which nothing that is kept may have
WORDS = ("fever chills sweats", "cough sputum wheeze", "well discharged home")


def row(who: str, number: int, label: int | None = None) -> dict[str, Any]:
    label = number % 3 if label is None else label
    return {"who": who, "note": f"{WORDS[label]}, number {number}", "class": LABELS[number % 3]}


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(one) + "\n" for one in rows))


def own_rows() -> list[dict[str, Any]]:
    return [row(f"t{n // 2}" if n > 1 else KEY, 1000 + n) for n in range(60)]


@pytest.fixture
def world(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site whose words say the class, and a released run whose head knows nothing."""
    monkeypatch.chdir(tmp_path)
    write("data.jsonl", own_rows())
    write("held.jsonl", [row(f"h{n // 2}", n) for n in range(60)])
    Path("site.toml").write_text(SITE)
    made_run(tmp_path / "run", tiny_encoder, CLASSIFY)
    few = Grid(pulls=(0.001,), steps=(4, 32), shares=(0.5, 1.0))
    monkeypatch.setattr(personalising, "Grid", lambda: few)
    monkeypatch.setattr(personalising, "ADAPTER_GRID", Grid((0.001,), (2, 4), (1.0,)))
    return tmp_path


def site() -> fedtune.Site:
    return load_site("site.toml")


def made() -> Personal:
    return personalise("run", site())


def opened() -> PersonalRun:
    return open_personal(Run("run"), site())


# ------------------------------------------------------------------------- what is written, and how


def numbers(arrays: dict[str, np.ndarray]) -> Finder:
    """Finds any sixteen bytes of the arrays' values, in each of the usual formats."""
    return Finder(
        (f"{name} {kind}", body[at : at + 16])
        for name, array in arrays.items()
        for kind in ("<f4", "<f8", "<f2")
        for body in [array.astype(kind).tobytes()]
        for at in range(0, len(body) - 15, 16)
        if any(body[at : at + 16])
    )


def own_numbers() -> Finder:
    """Finds what the personal model has and the released one has not."""
    return numbers({name: opened().adapter()[name] for name in opened()._arrays})


def test_it_is_sealed_for_this_user_and_says_in_clear_what_it_is_alone(world: Path) -> None:
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    result = made()
    assert result.file == personal_file(site(), Run("run")) and result.choice.better
    assert result.file.stat().st_mode & 0o777 == 0o600
    assert result.file.parent.stat().st_mode & 0o777 == 0o700
    content = result.file.read_bytes()
    assert content.startswith(HEADER) and MARK.encode() in content.split(b"\n")[0]
    assert not own_numbers().in_folder(world), "nowhere in clear"
    assert not Finder(forms(KEY)).in_folder(Path("state"))
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert after == before


def test_a_file_in_clear_would_be_found(world: Path) -> None:
    made()
    (world / "state" / "copy").write_bytes(save(opened()._arrays))
    assert [*own_numbers().in_folder(world)] == ["state/copy"]


def test_a_copy_opens_nowhere_else_and_a_changed_one_not_at_all(world: Path) -> None:
    path = made().file
    assert path is not None
    Path("other.toml").write_text(SITE.replace('state = "state"', 'state = "elsewhere"'))
    other = load_site("other.toml")
    Ledger(other.site.state)
    copy = personal_file(other, Run("run"))
    copy.parent.mkdir(mode=0o700)
    shutil.copy2(path, copy)
    with pytest.raises(InputError, match="cannot be opened with this site's key"):
        open_personal(Run("run"), other)
    whole = path.read_bytes()
    for changed in (whole[:-1], whole[:-20] + bytes(20), b"x" + whole[1:], HEADER, b""):
        path.write_bytes(changed)
        with pytest.raises(InputError, match="cannot be opened"):
            opened()
    path.write_bytes(whole)
    path.chmod(0o640)
    with pytest.raises(InputError, match="other users can read it"):
        opened()


def test_after_a_restore_with_another_salt_it_is_trained_again(world: Path) -> None:
    """Nobody could tell whether who withdraws is one of those on whom it was trained."""
    made()
    assert opened()
    state = site().site.state
    for name in ("ledger.db", "salt"):
        (state / name).unlink()
    Ledger.restore(state, None)
    with pytest.raises(InputError, match=r"salt.*to do: fedtune personalise"):
        opened()


def test_it_belongs_to_the_run_that_it_was_made_of(world: Path, tiny_encoder: Path) -> None:
    path = made().file
    assert path is not None
    made_run(Path("second"), tiny_encoder, CLASSIFY | {"max_length": 32})
    with pytest.raises(InputError, match="no personal model of second"):
        open_personal(Run("second"), site())
    shutil.copy2(path, personal_file(site(), Run("second")))
    with pytest.raises(InputError, match="is of another run"):
        open_personal(Run("second"), site())


def test_without_a_gain_the_released_model_is_kept(world: Path) -> None:
    """The labels follow from nothing. An earlier file is deleted: it is of other records."""
    earlier = made().file
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 60).tolist()
    head = Run("run").adapter()
    flat = {name: np.zeros_like(array) for name, array in head.items()}
    from safetensors.numpy import save_file

    save_file({n.removeprefix("head."): a for n, a in flat.items()}, "run/adapter/head.safetensors")
    write("data.jsonl", [row(f"t{n}", 3 * n + labels[n], n % 3) for n in range(60)])
    result = made()
    assert result.file is None and not result.choice.better and earlier is not None
    assert not personal_file(site(), Run("run")).exists()
    with pytest.raises(InputError, match="no personal model"):
        opened()


def test_the_audit_log_has_the_act_and_not_what_came_of_it(world: Path) -> None:
    made()
    write("data.jsonl", [row(f"t{n}", n * 7, n % 2) for n in range(30)])
    made()
    entries = verify_log(Path("state"), Ledger(Path("state")).key.public).entries
    told = [{k: entry[k] for k in ("event", "rule", "facts")} for entry in entries]
    assert len(told) == 2 and told[0] == told[1]
    assert told[0]["rule"] == "personalise" and sorted(told[0]["facts"]) == ["model", "plan"]


def test_a_purge_deletes_it(world: Path) -> None:
    path = made().file
    assert path is not None
    assert listing(site()).deletable["personal models"] == [path]
    purge(listing(site()))
    assert not path.exists()


# -------------------------------------------------------------------------------- on whom it trains


def trained() -> set[str]:
    return set(opened().about.units)


def hashed(*keys: str) -> set[str]:
    ledger = Ledger(Path("state"))
    return {ledger.hashed(unit_member(key)) for key in keys}


def test_whoever_is_held_out_is_never_trained_on(world: Path) -> None:
    """By the key, and under another key by a long text."""
    long = "a long text of the ward's own, by which it is told from all others"
    copied = {"who": "under another key", "note": long, "class": LABELS[0]}
    held = [json.loads(line) for line in Path("held.jsonl").read_text().splitlines()]
    write("held.jsonl", [*held, copied | {"who": "h-long"}])
    write("data.jsonl", [*own_rows(), row("h3", 9000), row("h3", 9001), copied])
    result = made()
    assert result.left_out == {HELD_OUT: 2} and result.patients == 30
    assert not trained() & hashed("h3", "under another key") and hashed(KEY) < trained()


def test_a_reader_that_forgets_who_is_held_out_is_caught(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("data.jsonl", [*own_rows(), row("h3", 9000), row("h3", 9001)])
    monkeypatch.setattr(records, "identities", lambda table: [])
    made()
    assert trained() & hashed("h3")


def test_who_does_not_consent_to_training_is_held_out_all_the_same(world: Path) -> None:
    text = SITE.replace("[acceptance]", '[data.consent]\ncolumn = "agreed"\n[acceptance]')
    Path("site.toml").write_text(text + '[acceptance.consent]\ncolumn = "agreed"\n')
    rows = [one | {"agreed": "no" if one["who"] == "t5" else "yes"} for one in own_rows()]
    write("data.jsonl", [*rows, row("h3", 9000) | {"agreed": "yes"}])
    write("held.jsonl", [row(f"h{n}", n) | {"agreed": "no"} for n in range(30)])
    assert made().left_out == {HELD_OUT: 1} and not trained() & hashed("t5", "h3")


def test_after_a_withdrawal_it_is_not_used_until_it_was_trained_again(world: Path) -> None:
    made()
    withdrawal = withdraw(site(), KEY, Ledger(Path("state")))
    assert withdrawal.personal == [personal_file(site(), Run("run"))]
    with pytest.raises(InputError, match=r"has withdrawn; .*fedtune personalise"):
        opened()
    assert command("predict", "run", "--data", "held.jsonl", "--site", "site.toml").exit_code == 2
    assert made().left_out == {WITHDREW: 1}
    assert not trained() & hashed(KEY)
    assert withdraw(site(), "h3", Ledger(Path("state"))).personal == []
    opened()


def test_on_a_ledger_that_is_not_mounted_nobody_is_trained_on(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has who withdrew. Nor is a model opened that was trained before."""
    monkeypatch.setenv("XDG_STATE_HOME", str(world / "xdg"))
    kept = made().file
    check_home(site())
    assert kept
    Path("state").rename("volume")
    Path("state").mkdir()
    with pytest.raises(ConfigError, match="is not there"):
        made()
    assert not any(Path("state").iterdir())
    shutil.copytree(Path("volume") / kept.parent.name, kept.parent)
    with pytest.raises(ConfigError, match="is not there"):
        opened()
    assert not Path("state", "ledger.db").exists()


def test_the_command_says_which_models_a_withdrawal_concerns(world: Path) -> None:
    made()
    Path("keys").write_text(f"{KEY}\n")
    shown = command("withdraw", "site.toml", "--file", "keys").output
    assert "not used until `fedtune personalise` ran again" in shown


def test_after_a_change_of_the_opt_outs_too(world: Path) -> None:
    text = SITE.replace("[acceptance]", '[data.consent]\nopt_outs = "out"\n[acceptance]')
    Path("site.toml").write_text(text)
    Path("out").write_text("# nobody\n")
    Path("out").chmod(0o600)
    made()
    opened()
    Path("out").write_text(sha256(KEY.encode()).hexdigest() + "\n")
    with pytest.raises(InputError, match="opt-outs has changed"):
        opened()
    made()
    assert not trained() & hashed(KEY)


def test_too_few_are_not_trained_on(world: Path) -> None:
    write("data.jsonl", own_rows()[:18])
    with pytest.raises(DataError, match="9 usable patients are left"):
        made()


def test_a_patient_is_in_one_fold_and_the_salt_says_in_which(world: Path) -> None:
    run, ledger = Run("run"), Ledger(Path("state"))
    own = read_own(site(), run.study, build(run.study), ledger)
    folds = own.folds(5)
    assert sorted(n for fold in folds for n in fold) == list(range(60))
    by_fold = [{int(own.units[n]) for n in fold} for fold in folds]
    assert [len(units) for units in by_fold] == [6] * 5 and len(set().union(*by_fold)) == 30
    assert list(own.hashes) == sorted(own.hashes), "an order that no name gives"


# ----------------------------------------------------------------------------- who may use it


def test_the_site_predicts_evaluates_and_judges_with_it(world: Path) -> None:
    made()
    model, data = opened(), [{"text": one["note"]} for one in own_rows()]
    gold = [one["class"] for one in own_rows()]
    own = [told["prediction"] for told in fedtune.predict(model, data).rows()]
    shared = [told["prediction"] for told in fedtune.predict(Run("run"), data).rows()]
    assert own == gold and shared != gold
    file = fedtune.DataFile(path=world / "held.jsonl", columns=Columns(text="note", label="class"))
    figures = fedtune.evaluate(model, file, "accuracy")
    assert figures["after"]["accuracy"] > 0.9 and figures["of the run"] == [model.mark]
    judged = accept(model, site())
    names = list(judged.figures["models"])
    assert names == ["this model", "released model", "base alone"]
    accuracy = {n: judged.figures["models"][n]["accuracy"]["figure"] for n in names}
    assert accuracy["this model"] > 0.9 > accuracy["released model"]
    record = read_record(judged.folder / "record.json", Ledger(Path("state")).key.public)
    path = personal_file(site(), Run("run"))
    assert record["model"]["adapter"] == sha256(path.read_bytes()).hexdigest()
    assert "personal model" in (judged.folder / "page.html").read_text()


def test_it_is_not_judged_by_whom_it_was_trained_on(world: Path) -> None:
    """Not even when they have left the training file for the held-out one. Twin: the released
    model, which knows none of them."""
    made()
    held = [json.loads(line) for line in Path("held.jsonl").read_text().splitlines()]
    moved = [one for one in own_rows() if one["who"] in ("t5", "t6")]
    write("data.jsonl", [one for one in own_rows() if one not in moved])
    write("held.jsonl", held + moved)
    assert accept(opened(), site()).figures["left_out"] == {TRAINED: 2}
    assert accept(Run("run"), site()).figures["left_out"] == {}


def test_so_do_the_commands(world: Path) -> None:
    first = json.loads(command("personalise", "run", "--json").stdout)
    assert first["kept"] == "personal" and first["file"] == str(opened_path())
    columns = ("--column", "text=note", "--column", "label=class")
    measured = command(
        "evaluate", "run", "--data", "held.jsonl", *columns, "--metric", "accuracy",
        "--site", "site.toml", "--json",
    )  # fmt: skip
    assert json.loads(measured.stdout)["after"]["accuracy"] > 0.9
    asked = ("predict", "run", "--data", "held.jsonl", "--column", "text=note")
    shown = command(*asked, "--site", "site.toml", "--out", "own.csv")
    assert shown.exit_code == 0 and MARK in shown.output
    assert MARK not in command(*asked, "--out", "shared.csv").output
    assert Path("own.csv").read_text() != Path("shared.csv").read_text()
    judged = json.loads(command("accept", "run", "--personal", "--json").stdout)
    assert "released model" in judged["models"]
    assert "released model" not in json.loads(command("accept", "run", "--json").stdout)["models"]
    told = command("accept", "run", "--personal", "--tell", "told.json")
    assert told.exit_code == 2 and not Path("told.json").exists()


def opened_path() -> Path:
    return personal_file(site(), Run("run"))


def as_text(base: Path, objective: str, columns: str, **more: Any) -> Run:
    """The same site for a model that writes."""
    shutil.rmtree("run")
    text = SITE.replace('text = "note", label = "class"', columns)
    Path("site.toml").write_text(text.replace("accuracy = 0.1", "loss = 90.0"))
    for path in ("data.jsonl", "held.jsonl"):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        write(path, [one | {"good": " yes", "bad": " no"} for one in rows])
    lora = CAUSAL_LORA | more
    return made_run(Path("run"), base, {"name": objective, "max_length": 64}, lora=lora)


PAIR = 'prompt = "note", chosen = "good", rejected = "bad"'
KINDS = {
    "LoRA": ("causal_lm", 'prompt = "note", completion = "good"', {}),
    "LoRA, both factors": ("causal_lm", 'prompt = "note", completion = "good"', {"train": "AB"}),
    "preferences": ("dpo", PAIR, {}),
    "preferences, orpo": ("orpo", PAIR, {}),
    "a reward head": ("reward", PAIR, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_preferences_are_personalised_too(
    world: Path, tiny_base: Path, kind: str
) -> None:
    objective, columns, more = KINDS[kind]
    run = as_text(tiny_base, objective, columns, **more)
    before = run.adapter()
    result = made()
    assert result.choice.personal < result.choice.shared and result.file is not None
    model = opened()
    changed = {n for n, a in model.adapter().items() if not np.array_equal(a, before[n])}
    assert changed and changed <= set(model._arrays) and set(model.adapter()) == set(before)
    judged = accept(model, site())
    loss = {n: judged.figures["models"][n]["loss"]["figure"] for n in judged.figures["models"]}
    assert loss["this model"] < loss["released model"]


def test_what_it_writes_is_marked(world: Path, tiny_base: Path) -> None:
    run = as_text(tiny_base, "causal_lm", 'prompt = "note", completion = "good"')
    made()
    before, after = fedtune.generate(run, "Does it hurt?", 6)
    base, own = fedtune.generate(opened(), "Does it hurt?", 6)
    mark = f"[personal model of north, {MARK}]"
    assert own.startswith(mark) and MARK not in after and base == before
    assert own.removeprefix(mark).strip() != after
    shown = command("generate", "run", "--prompt", "Does it hurt?", "--site", "site.toml", "--json")
    assert json.loads(shown.stdout)["adapter"].startswith(mark)


def test_a_head_of_class_statistics_is_personalised(world: Path) -> None:
    """What the sites sent were sums; the site itself trains the head that was made of them."""
    plan = json.loads(Path("run/plan.json").read_text())
    plan["objective"] |= {"name": "prototypes", "options": {"directions": 4}}
    Path("run/plan.json").write_text(json.dumps(plan))
    assert made().file is not None
    file = fedtune.DataFile(path=world / "held.jsonl", columns=Columns(text="note", label="class"))
    assert fedtune.evaluate(opened(), file, "accuracy")["after"]["accuracy"] > 0.9


# ------------------------------------------------------------------------ who is refused, by name


PUBLIC = PublicTable(path=Path("held.jsonl"), columns=Columns(prompt="note"), licence="CC0-1.0")


def as_teacher(model: Any) -> Any:
    options = {"teacher": str(model), "digest": f"sha256:{'0' * 64}"}
    objective = ObjectiveTable(name="distill", options=options)
    return register_teacher(Run("run").study.model_copy(update={"objective": objective}))


OF_A_RUN: dict[str, Callable[[Any], Any]] = {
    "export": lambda model: fedtune.export(model, "made"),
    "merge": lambda model: fedtune.merge([model, Run("run")], "made"),
    "distill": lambda model: fedtune.distill([model], PUBLIC, "made", layers=1),
    "improve": lambda model: fedtune.improve(model, Run("run"), PUBLIC, "made"),
    "improve, as the reward": lambda model: fedtune.improve(Run("run"), model, PUBLIC, "made"),
    "label, as the judge": lambda model: fedtune.label(site(), "made.jsonl", judge=model),
    "label": lambda model: fedtune.label(site(), "made.jsonl", generator=model),
    "answers": lambda model: fedtune.answers(model),
    "attack": lambda model: fedtune.attack_site(model, site(), "held.jsonl"),
    "personalise": lambda model: personalise(model, site()),
    "tell": lambda model: tell(model, site(), "made"),
    "release": lambda model: fedtune.release(model, "made"),
    "metrics": lambda model: model.write_metrics("made.csv"),
}
OF_A_PATH: dict[str, Callable[[Any], Any]] = {
    "release": lambda path: fedtune.release(path, "made"),
    "teacher": as_teacher,
    "label": lambda path: fedtune.label(site(), "made.jsonl", generator=str(path)),
    "label, as the judge": lambda path: fedtune.label(site(), "made.jsonl", judge=str(path)),
    "merge exported": lambda path: fedtune.merge_models([path, Path("run")], "made"),
    "verify": check_signed,
    "run": Run,
}


@pytest.mark.parametrize("what", OF_A_RUN)
def test_an_opened_model_is_refused(world: Path, tiny_base: Path, what: str) -> None:
    as_text(tiny_base, "causal_lm", 'prompt = "note", completion = "good"')
    made()
    before = sorted(path for path in world.rglob("*") if "audit" not in path.name)
    with pytest.raises(FedtuneError) as refused:
        OF_A_RUN[what](opened())
    assert isinstance(refused.value, NeverLeaves), refused.value
    assert refused.value.exit_code == 3 and MARK in str(refused.value)
    assert "start a new study" in str(refused.value)
    assert sorted(path for path in world.rglob("*") if "audit" not in path.name) == before


@pytest.mark.parametrize("what", OF_A_PATH)
def test_so_is_its_file_and_the_folder_of_it(world: Path, what: str) -> None:
    path = made().file
    assert path is not None and is_sealed(path)
    renamed = Path("other-name.bin")
    shutil.copy2(path, renamed)
    for place in (path, path.parent, renamed):
        with pytest.raises(FedtuneError) as refused:
            OF_A_PATH[what](place)
        assert isinstance(refused.value, NeverLeaves) and MARK in str(refused.value)


COMMANDS = {
    "export": ("export", "IT", "--out", "made"),
    "merge": ("merge", "IT", "run", "--out", "made"),
    "release": ("release", "IT", "--out", "made"),
    "distill": ("distill", "IT", "--prompts", "held.jsonl", "--licence", "CC0-1.0", "--layers",
                "2", "--out", "made"),
    "generate": ("generate", "IT", "--prompt", "x"),
    "predict": ("predict", "IT", "--data", "held.jsonl"),
    "evaluate": ("evaluate", "IT", "--data", "held.jsonl"),
    "accept": ("accept", "IT"),
    "verify": ("personalise", "IT"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_it_with_exit_code_3(world: Path, name: str) -> None:
    path = made().file
    for place in (path, Path("state/personal")):
        words = [str(place) if word == "IT" else word for word in COMMANDS[name]]
        done = command(*words)
        assert done.exit_code == 3 and "personal model" in done.output, done.output
        assert not Path("made").exists()


def test_no_other_command_knows_how_to_open_it() -> None:
    """`--site` of commands that use a run, `accept --personal`, and who withdraws."""
    root = Path(fedtune.__file__).parent
    named = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if "open_personal" in path.read_text() or "_unsealed" in path.read_text()
    }
    assert named == {"cli/accept.py", "cli/personalise.py", "runs/personal.py"}


def test_a_run_that_lost_its_refusal_is_caught(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: a personal run with a folder, as a subclass that forgot would have one."""
    made()
    monkeypatch.setattr(PersonalRun, "__getattr__", lambda self, name: self.shared.folder)
    with pytest.raises(FedtuneError) as raised:
        fedtune.merge([opened(), Run("run")], "made")
    assert not isinstance(raised.value, NeverLeaves)


# --------------------------------------------------------------------------------------- the fit


def a_fit(rows: int = 40, seed: int = 0) -> tuple[Fit, np.ndarray, torch.nn.Parameter]:
    """Linear regression: what is fitted can be computed otherwise."""
    draw = np.random.default_rng(seed)
    x = torch.tensor(draw.normal(size=(rows, 3)), dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w = torch.nn.Parameter(torch.tensor([0.3, 0.0, 0.0], dtype=torch.float64))

    def losses(some: Any) -> Any:
        at = torch.tensor(list(some))
        yield at.numpy(), (x[at] @ w - y[at]) ** 2 / 2

    return Fit({"w": w}, {"w": 1.0}, losses), np.arange(rows), w


@pytest.mark.parametrize("pull", [10.0, 0.1])
def test_the_fit_is_the_regularised_optimum(pull: float) -> None:
    fit, rows, w = a_fit()
    (*_, change) = fit.path(rows.tolist(), pull, (30,))
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 3))
    gap = np.array([1.0, -2.0, 0.5]) - [0.3, 0, 0]
    moment = x.T @ x / 40
    expected = np.linalg.solve(moment + pull * np.eye(3), moment @ gap)
    assert change["w"].numpy() == pytest.approx(expected, abs=1e-4)
    fit.load(change, 0.5)
    assert w.detach().numpy() == pytest.approx([0.3, 0, 0] + expected / 2, abs=1e-4)
    fit.restore()
    assert w.detach().numpy() == pytest.approx([0.3, 0, 0])


def test_a_fit_to_noise_is_not_taken_for_better() -> None:
    """Of many sets without anything to learn, few are called better; with something, all are."""
    told = []
    for seed in range(40):
        draw = np.random.default_rng(seed)
        told.append(bound_gain(draw.normal(size=60), np.repeat(np.arange(20), 3)) > 0)
    assert sum(told) <= 6  # 2 expected
    agreeing = np.repeat(np.random.default_rng(1).normal(size=20), 3)
    assert bound_gain(agreeing + 0.3, np.repeat(np.arange(20), 3)) < bound_gain(
        agreeing + 0.3, np.arange(60)
    ), "records of one patient are no evidence of their own"
    fit, rows, _ = a_fit()
    folds = [rows[rows % 4 == part].tolist() for part in range(4)]
    grid = replace(Grid(), pulls=(0.1, 0.001), steps=(1, 8))
    choice = choose(fit, folds, rows, grid)
    assert choice.better and choice.way.pull == 0.001 and choice.personal < choice.shared


def test_no_fold_is_judged_by_a_fit_that_saw_it() -> None:
    fit, rows, _ = a_fit()
    seen: list[tuple[set[int], set[int]]] = []
    path, scores, fitted = fit.path, fit.scores, [set[int]()]

    def noted_path(some: Any, *rest: Any) -> Any:
        fitted[0] = set(some)
        return path(some, *rest)

    def noted_scores(some: Any) -> Any:
        seen.append((fitted[0], set(some)))
        return scores(some)

    fit.path, fit.scores = noted_path, noted_scores  # type: ignore[method-assign]
    choose(fit, [rows[:10].tolist(), rows[10:].tolist()], rows, Grid((0.1,), (1, 2), (1.0,)))
    assert len(seen) == 5 and not any(own & judged for own, judged in seen)


def test_seals_are_never_equal(world: Path) -> None:
    first = made().file
    assert first is not None
    before = first.read_bytes()
    arrays = opened().adapter()
    made()
    assert first.read_bytes()[len(HEADER) :] != before[len(HEADER) :]
    again = opened().adapter()
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays), "fitted alike"
    assert personal.NONCE == 12


@pytest.mark.parametrize("first", ["none", "another"])
def test_a_model_of_patients_by_another_column_opens_no_more(world: Path, first: str) -> None:
    """Whoever withdraws by the new column has another hash than the model was sealed with, so the
    command that withdraws a patient names the model."""
    for name in ("data.jsonl", "held.jsonl"):
        rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
        write(name, [row | {"mrn": "M" + row["who"]} for row in rows])
    Path("site.toml").write_text(SITE.replace(', patient = "who"', "") if first == "none" else SITE)
    made()
    opened()
    Path("site.toml").write_text(SITE.replace('patient = "who"', 'patient = "mrn"'))
    with pytest.raises(InputError, match="another column tells patients apart"):
        opened()
    assert withdraw(site(), "M" + KEY, Ledger(Path("state"))).personal
