"""`fedtune answers`: base and adapter on the same public prompts, kept where only people look."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtune
from fedtune.core.config import Columns, DataFile
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.models.build import build
from fedtune.core.run_folder import ANSWERS
from fedtune.evaluation.answers import answers, choose_rows
from fedtune.evaluation.generate import generate
from fedtune.evaluation.predict import predict
from tests.cli_kit import run as command
from tests.cli_kit import write_study
from tests.heads_kit import CAUSAL_LORA, LABELS, evaluation, made_run
from tests.test_predict import CHOICES, YES_NO, chooser, classifier

TEXT_COLUMNS = {"prompt": "q", "completion": "a"}


def writer(folder: Path, base: Path) -> fedtune.Run:
    rows = [{"q": f"fever, day {n}", "a": f" it went, {n}"} for n in range(9)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = evaluation(folder / "test.jsonl", TEXT_COLUMNS)
    return made_run(folder / "run", base, YES_NO, lora=CAUSAL_LORA, evaluation=table)


def test_texts_are_what_generate_writes(tmp_path: Path, tiny_base: Path) -> None:
    run = writer(tmp_path, tiny_base)
    found = answers(run, 3, max_new_tokens=6)
    assert [one["row"] for one in found["answers"]] == [1, 4, 7]
    for one in found["answers"]:
        base, adapter = generate(run, one["prompt"], 6)
        assert (one["base"]["answer"], one["adapter"]["answer"]) == (base, adapter)
        assert one["expected"] == f"it went, {one['row'] - 1}"
    assert any(one["base"] != one["adapter"] for one in found["answers"])
    kept = run.folder / ANSWERS
    assert json.loads(kept.read_text()) == found and kept.stat().st_mode & 0o777 == 0o600


def test_a_head_answers_with_a_label_and_the_base_with_none(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    run = classifier(tmp_path, tiny_encoder)
    found = answers(run)
    made = predict(run, [one["prompt"] for one in found["answers"]])
    for one, label, shares in zip(
        found["answers"], made.predicted, made.probabilities, strict=True
    ):
        assert one["adapter"] == {"answer": label, "probability": pytest.approx(shares.max())}
        assert one["base"] == {"answer": None, "probability": pytest.approx(1 / len(LABELS))}
        assert one["expected"] in LABELS


def test_of_choices_the_base_is_asked_too(tmp_path: Path, tiny_base: Path) -> None:
    """The base's figures are those of a run whose adapter is zero."""
    run = chooser(tmp_path, tiny_base)
    found = answers(run, 2)
    untouched = predict(run, [{"q": one["prompt"]} for one in found["answers"]], base_alone=True)
    network = build(run.study)
    frozen = {name: array for name, array in run.adapter().items() if "lora_A" in name}
    copy = shutil.copytree(run.folder, tmp_path / "zero")
    with network.loaded(trainable=network.zero(), frozen=frozen):
        network.save(copy / "adapter")
    plain = predict(fedtune.Run(copy), [{"q": one["prompt"]} for one in found["answers"]])
    np.testing.assert_allclose(untouched.outputs, plain.outputs, atol=1e-5)
    for one, label in zip(found["answers"], plain.predicted, strict=True):
        assert one["base"]["answer"] == str(label).strip() and one["expected"] in map(
            str.strip, CHOICES
        )


def test_rows_are_spread_over_the_file_and_those_without_a_prompt_left_out(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    rows: list[Any] = [{"q": f"p{n}", "a": "y"} for n in range(10)]
    rows[0], rows[5] = {"q": "", "a": "y"}, "no object"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = DataFile(path=path, columns=Columns(prompt="q", completion="a"))
    assert [one.row for one in choose_rows(file, 4)] == [2, 4, 7, 9]
    assert len(choose_rows(file, 20)) == 8
    path.write_text('{"q": "", "a": "y"}\n')
    with pytest.raises(DataError, match="no row has a prompt"):
        choose_rows(file, 4)


def test_a_conversation_of_one_turn_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    user, told = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [{"m": [user, told]}, {"m": [user, told, user, told]}, {"m": [user]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = choose_rows(DataFile(path=path, columns=Columns(messages="m")), 4)
    assert [(one.row, one.prompt, one.expected) for one in found] == [(1, "q", "a"), (3, "q", "")]


def test_what_has_no_answer_in_words_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    bare = made_run(tmp_path / "bare", tiny_base, YES_NO, lora=CAUSAL_LORA)
    with pytest.raises(ConfigError, match=r"no \[evaluation\] records"):
        answers(bare)
    run = writer(tmp_path, tiny_base)
    reward = run.study.objective.model_copy(update={"name": "reward"})
    run.study = run.study.model_copy(update={"objective": reward})
    with pytest.raises(ConfigError, match="its answers are scores"):
        answers(run)
    assert not (run.folder / ANSWERS).exists()


def test_a_run_whose_answers_are_kept_verifies_and_exports_without_them(
    tmp_path: Path, tiny_base: Path
) -> None:
    """A resumed run keeps them too: nothing of the run reads or writes them."""
    study, out = write_study(tmp_path, tiny_base), tmp_path / "run"
    assert command("simulate", study, "--sites", tmp_path, "--out", out).exit_code == 0
    before = fedtune.verify_run(out)
    done = command("answers", out, "--count", "2", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kind"] == "label"
    after = fedtune.verify_run(out)
    assert ANSWERS in set(after.not_signed) - set(before.not_signed)
    assert (after.epsilon, after.files) == (before.epsilon, before.files)
    assert command("export", out, "--out", tmp_path / "model").exit_code == 0
    prompt = json.loads((out / ANSWERS).read_text())["answers"][0]["prompt"]
    for path in (tmp_path / "model").rglob("*"):
        assert not path.is_file() or prompt.encode() not in path.read_bytes(), path
    again = command("simulate", study, "--sites", tmp_path, "--out", out, "--resume")
    assert again.exit_code == 0 and (out / ANSWERS).exists(), again.output


def test_the_table_prints_markup_and_escapes_as_text(tmp_path: Path, tiny_base: Path) -> None:
    run = writer(tmp_path, tiny_base)
    rows = [{"q": "[red]fever[/red] \x1b[31mred", "a": " <b>yes</b>"}]
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    done = command("answers", run.folder, "--max-new-tokens", "2")
    assert done.exit_code == 0, done.output
    assert "[red]fever[/red]" in done.output and "\x1b[31m" not in done.output
