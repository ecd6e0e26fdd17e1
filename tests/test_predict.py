"""`fedtune predict`: a row for each record, and what `evaluate` measures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch

import fedtune
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.models.loaded import load
from fedtune.evaluation.generate import generate
from fedtune.evaluation.predict import predict
from fedtune.evaluation.predictions import Predictions
from fedtune.evaluation.run import evaluate
from tests.cli_kit import run as command
from tests.heads_kit import (
    CAUSAL_LORA,
    CLASSIFY,
    ENCODER_LORA,
    LABELS,
    TEXTS,
    evaluation,
    made_run,
)

CHOICES = (" yes", " no", " perhaps so")
YES_NO = {"name": "causal_lm", "max_length": 64}


def labelled(path: Path, number: int = 24) -> list[dict[str, str]]:
    rows = [{"note": f"{TEXTS[n % 4]} {n}", "class": LABELS[n % 3]} for n in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def classifier(folder: Path, base: Path, lora: Any = None) -> fedtune.Run:
    labelled(folder / "test.jsonl")
    table = evaluation(folder / "test.jsonl", {"text": "note", "label": "class"}, metric="accuracy")
    return made_run(folder / "run", base, CLASSIFY, lora=lora, evaluation=table)


def chooser(folder: Path, base: Path, choices: tuple[str, ...] = CHOICES) -> fedtune.Run:
    rows = [{"q": f"{TEXTS[n % 3]} {n}:", "a": choices[n % len(choices)]} for n in range(18)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = evaluation(
        folder / "test.jsonl", {"prompt": "q", "completion": "a"},
        metric="accuracy", choices=list(choices),
    )  # fmt: skip
    return made_run(folder / "run", base, YES_NO, lora=CAUSAL_LORA, evaluation=table)


@pytest.fixture
def run(tmp_path: Path, tiny_encoder: Path) -> fedtune.Run:
    return classifier(tmp_path, tiny_encoder)


# -------------------------------------------------------------------------------- what is predicted


@pytest.mark.parametrize("kind", ["head", "encoder", "causal"])
def test_a_head_gives_what_plain_peft_gives(
    kind: str, tmp_path: Path, tiny_encoder: Path, tiny_base: Path
) -> None:
    base = tiny_base if kind == "causal" else tiny_encoder
    lora = {"head": None, "encoder": ENCODER_LORA, "causal": CAUSAL_LORA}[kind]
    run = classifier(tmp_path, base, lora)
    made = predict(run, list(TEXTS))
    plain = load(run.folder)
    for text, outputs, label in zip(TEXTS, made.outputs, made.predicted, strict=True):
        logits = plain.scores(np.array(plain.tokenizer(text).input_ids))
        np.testing.assert_allclose(outputs, logits, atol=1e-4)
        assert label == LABELS[int(logits.argmax())]
    shares = torch.softmax(torch.from_numpy(made.outputs), dim=1).numpy()
    np.testing.assert_allclose(made.probabilities, shares)
    assert made.outputs.std(axis=0).min() > 1e-2  # else the comparison could not fail


@pytest.mark.parametrize("choices", [("a", "b", "c"), CHOICES], ids=["a token each", "longer"])
def test_choices_are_scored_as_evaluate_does(
    choices: tuple[str, ...], tmp_path: Path, tiny_base: Path
) -> None:
    run = chooser(tmp_path, tiny_base, choices)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("a")  # what is right is not read
    made = predict(run, rows)
    right = [label == choices[n % len(choices)] for n, label in enumerate(made.predicted)]
    measured = evaluate(run, tmp_path / "test.jsonl")
    assert np.mean(right) == measured["after"]["accuracy"] > 0
    plain = load(run.folder)
    for row, outputs in zip(rows[:3], made.outputs, strict=False):
        prompt = plain.tokenizer.encode(row["q"], add_special_tokens=False)
        expected = []
        for choice in choices:
            ids = [*prompt, *plain.tokenizer.encode(choice, add_special_tokens=False)]
            at = np.arange(len(prompt) - 1, len(ids) - 1)
            logp = plain.next_tokens(np.array(ids), at)
            expected.append(float(logp[range(len(at)), ids[len(prompt) :]].sum()))
        np.testing.assert_allclose(np.diff(outputs), np.diff(expected), atol=1e-4)
    assert made.labels == choices and np.allclose(made.probabilities.sum(axis=1), 1)


def test_predictions_are_right_as_often_as_the_report_says(run: fedtune.Run) -> None:
    table = run.study.evaluation
    assert table
    rows = [json.loads(line) for line in table.path.read_text().splitlines()]
    right = [
        label == row["class"]
        for label, row in zip(predict(run, table.path).predicted, rows, strict=True)
    ]
    assert 0 < np.mean(right) == evaluate(run, table.path)["after"]["accuracy"] < 1


def test_a_reward_head_scores_a_prompt_with_its_completion(tmp_path: Path, tiny_base: Path) -> None:
    objective = {"name": "reward", "max_length": 64}
    run = made_run(tmp_path / "run", tiny_base, objective, lora=CAUSAL_LORA)
    rows = [{"prompt": f"day {n}: ", "completion": f"home in {n} weeks"} for n in range(5)]
    made = predict(run, rows)
    plain = load(run.folder)
    for row, score in zip(rows, made.scores, strict=True):
        ids = [
            *plain.tokenizer.encode(row["prompt"]),
            *plain.tokenizer.encode(row["completion"]),
            plain.tokenizer.eos_token_id,
        ]
        assert score == pytest.approx(float(plain.scores(np.array(ids))[0]), abs=1e-4)
    assert made.labels == () and made.predicted == [None] * 5 and len(set(made.scores)) == 5
    assert list(made.rows()[0]) == ["row", "score", "reason"]
    with pytest.raises(DataError, match="no column 'completion'"):
        predict(run, [{"prompt": "day 1"}])


def test_a_chat_is_completed_with_each_choice(tmp_path: Path, tiny_base: Path) -> None:
    turns = [[{"role": "user", "content": f"{TEXTS[n % 3]} {n}"}] for n in range(6)]
    full = [[*t, {"role": "assistant", "content": CHOICES[n % 2]}] for n, t in enumerate(turns)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"turns": t}) + "\n" for t in full))
    table = evaluation(tmp_path / "test.jsonl", {"messages": "turns"})
    run = made_run(tmp_path / "run", tiny_base, YES_NO, lora=CAUSAL_LORA, evaluation=table)
    made = predict(run, [{"turns": t} for t in turns], CHOICES)
    np.testing.assert_array_equal(made.outputs, predict(run, table["path"], CHOICES).outputs)
    plain = load(run.folder)
    prompt = plain.tokenizer.apply_chat_template(
        turns[0], add_generation_prompt=True, return_dict=False
    )
    expected = []
    for choice in CHOICES:
        ids = [*prompt, *plain.tokenizer.encode(choice, add_special_tokens=False)]
        at = np.arange(len(prompt) - 1, len(ids) - 1)
        logp = plain.next_tokens(np.array(ids), at)
        expected.append(float(logp[range(len(at)), ids[len(prompt) :]].sum()))
    np.testing.assert_allclose(made.outputs[0], expected, atol=1e-4)


def test_the_network_is_left_as_it_was(run: fedtune.Run) -> None:
    from fedtune.core.models.build import build

    before = build(run.study).trainable()
    predict(run, ["fever"])
    for name, value in build(run.study).trainable().items():
        np.testing.assert_array_equal(value, before[name])


# ----------------------------------------------------------------------------------- rows and files

BAD = [
    {"note": "fever"},
    {"note": ""},
    {"note": None},
    {"note": 7},
    {"note": "cough"},
    {"note": "word " * 200},
    {"note": "none"},
]
REASONS = ["", "empty text", "missing value", "wrong type", "", "too long", ""]


def test_rejected_records_keep_their_place(run: fedtune.Run, tmp_path: Path) -> None:
    made = predict(run, BAD)
    assert list(made.reasons) == REASONS and made.rejected.total() == 4
    assert [label is None for label in made.predicted] == [bool(reason) for reason in REASONS]
    lone = predict(run, [row for row, why in zip(BAD, REASONS, strict=True) if not why])
    np.testing.assert_allclose(made.outputs[[0, 4, 6]], lone.outputs, atol=1e-5)
    rows = made.rows()
    assert [row["row"] for row in rows] == [*range(1, 8)]
    assert rows[1]["prediction"] is None and rows[1]["probability.cough"] is None
    assert rows[1]["reason"] == "empty text" and rows[0]["reason"] is None
    assert "word" not in repr(made) and "7 records" in repr(made)


def test_a_choice_is_told_without_its_space_unless_two_would_be_one() -> None:
    outputs = np.array([[0.0, 1.0]])
    made = Predictions((" yes", " no"), outputs, ("",)).rows()[0]
    assert made["prediction"] == "no" and {"probability.yes", "probability.no"} < made.keys()
    made = Predictions((" yes", "yes"), outputs, ("",)).rows()[0]
    assert made["prediction"] == "yes" and {"probability. yes", "probability.yes"} < made.keys()


def test_every_format_is_read_and_written(run: fedtune.Run, tmp_path: Path) -> None:
    frame = pandas.DataFrame({"note": [*TEXTS, "cough"], "other": range(5)})
    frame.to_csv(tmp_path / "in.csv", index=False)
    frame.to_parquet(tmp_path / "in.parquet")
    frame.to_json(tmp_path / "in.jsonl", orient="records", lines=True)
    (tmp_path / "in.txt").write_text("\n".join(frame["note"]))
    expected = predict(run, frame)
    for suffix in ("csv", "parquet", "jsonl", "txt"):
        made = predict(run, tmp_path / f"in.{suffix}")
        np.testing.assert_allclose(made.outputs, expected.outputs, atol=1e-6)
    bad = predict(run, [*BAD])
    for suffix in ("csv", "jsonl", "parquet"):
        out = bad.write(tmp_path / f"out.{suffix}")
        assert out.stat().st_mode & 0o777 == 0o600
    with (tmp_path / "out.csv").open() as handle:
        written = list(csv.DictReader(handle))
    assert [row["reason"] for row in written] == REASONS
    assert written[1]["prediction"] == "" and float(written[0]["probability.fever"]) > 0
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [json.loads(line) for line in lines] == table == bad.rows()
    with pytest.raises(ConfigError, match="unsupported suffix"):
        bad.write(tmp_path / "out.xlsx")


def test_a_frame_s_missing_value_is_one(run: fedtune.Run) -> None:
    frame = pandas.DataFrame({"note": ["fever", None, float("nan")]})
    assert predict(run, frame).reasons == ("", "missing value", "missing value")


def test_lines_of_text_keep_their_numbers(run: fedtune.Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbffever\r\n\r\nbad \xff\ncough")
    made = predict(run, tmp_path / "in.txt")
    assert made.reasons == ("", "empty text", "not UTF-8", "")


def test_a_row_that_no_file_format_allows_keeps_its_place(run: fedtune.Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"note": "fever"}\nnot json\n{"note": "cough"}\n')
    assert predict(run, tmp_path / "in.jsonl").reasons == ("", "not JSON", "")
    (tmp_path / "in.csv").write_text("note,x\nfever,1\ncough\nnone,2\n")
    assert predict(run, tmp_path / "in.csv").reasons == ("", "wrong column count", "")
    (tmp_path / "in.csv").write_bytes('"note";"x"\r\n"fièvre";"2"\r\n'.encode("latin-1"))
    made = predict(run, tmp_path / "in.csv")
    assert made.reasons == ("",) and made.labels == predict(run, ["fièvre"]).labels


def test_many_records_are_read_in_parts(run: fedtune.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"fever day {n}" for n in range(10)]
    whole = predict(run, texts)
    monkeypatch.setattr("fedtune.evaluation.predict.CHUNK", 3)
    np.testing.assert_allclose(predict(run, texts).outputs, whole.outputs, atol=1e-5)


# ----------------------------------------------------------------------------------------- refusals


def test_what_cannot_predict_says_what_does(tmp_path: Path, tiny_base: Path) -> None:
    run = made_run(tmp_path / "run", tiny_base, YES_NO, lora=CAUSAL_LORA)
    with pytest.raises(ConfigError, match=r"has no head.*--choice"):
        predict(run, ["fever"])
    assert predict(run, ["Is it so?"], [" yes", " no"]).labels == (" yes", " no")
    with pytest.raises(ConfigError, match="two choices have the same tokens"):
        predict(run, ["Is it so?"], [" yes", " yes"])
    (tmp_path / "in.txt").write_text("fever\n")
    with pytest.raises(DataError, match="this run reads prompt"):
        predict(run, tmp_path / "in.txt", [" yes", " no"])


def test_what_is_no_file_of_records_says_so(run: fedtune.Run, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\nfever\n")
    with pytest.raises(DataError, match=r"no column 'note', which evaluation.columns.text names"):
        predict(run, tmp_path / "in.csv")
    with pytest.raises(DataError, match="a folder"):
        predict(run, tmp_path)
    with pytest.raises(DataError, match="no records"):
        predict(run, [])
    with pytest.raises(ConfigError, match="its head already has classes"):
        predict(run, ["fever"], [" yes", " no"])
    with pytest.raises(ConfigError, match="fedtune predict"):
        generate(run, "fever")


def test_a_run_without_public_records_names_the_option_that_fits(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    """As `fedtune init --label` makes it: no table of the study says what a column is called."""
    run = made_run(tmp_path / "run", tiny_encoder, CLASSIFY)
    (tmp_path / "in.csv").write_text("note\nfever\n")
    with pytest.raises(DataError, match=r"correct --column text=NAME"):
        predict(run, tmp_path / "in.csv")
    ask = ("predict", run.folder, "--data", tmp_path / "in.csv", "--column", "text=note")
    assert command(*ask).exit_code == 0


# -------------------------------------------------------------------------------------- the command


def test_the_command(run: fedtune.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "in.csv").write_text("text\n" + "fever\n" * 30 + '""\n')
    ask = ("predict", run.folder, "--data", tmp_path / "in.csv", "--column", "text=text")
    done = command(*ask)
    assert done.exit_code == 0, done.output
    label = predict(run, ["fever"]).predicted[0]
    assert "31 records, the first 20 above" in done.output and f"30 {label}" in done.output
    assert "1 rejected: empty text" in done.output
    done = command(*ask, "--out", tmp_path / "out.csv")
    assert "31 rows, in the order of" in " ".join(done.output.split())
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 32
    body = json.loads(command(*ask, "--json").stdout)
    assert body["rejected"] == {"empty text": 1} and len(body["predictions"]) == 31
    for out in ("in.csv", "out.xlsx"):
        assert command(*ask, "--out", tmp_path / out).exit_code == 2
    assert (tmp_path / "in.csv").read_text().startswith("text\nfever")


def test_columns_of_the_file_go_with_the_predictions(run: fedtune.Run, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"note": TEXTS[0], "id": "0012", "visit": 3, "mixed": 1},
        {"note": " ", "id": "0013", "visit": 4, "mixed": "a"},  # rejected; its key is still there
        {"note": TEXTS[1], "id": None, "visit": 2**63, "mixed": 2.5},
    ]
    file, frame = tmp_path / "new.jsonl", pandas.DataFrame(rows[:2])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    frame.to_csv(tmp_path / "new.csv", index=False)
    made = predict(run, file, ids=["id", "visit", "mixed", "id"])
    names = ["row", "id", "visit", "mixed", "prediction"]
    assert [list(row)[:5] for row in made.rows()] == 3 * [names]
    assert made.carried["id"] == ("0012", "0013", None) and made.reasons[1] == "empty text"
    assert made.carried["visit"] == ("3", "4", str(2**63)), "no format holds it as a number"
    assert made.carried["mixed"] == ("1", "a", "2.5")
    alone = predict(run, file)
    assert alone.reasons == made.reasons and np.array_equal(
        alone.outputs, made.outputs, equal_nan=True
    )
    read = pyarrow.parquet.read_table(made.write(tmp_path / "out.parquet")).to_pylist()
    assert [row["id"] for row in read] == ["0012", "0013", None]
    framed = predict(run, frame, ids=["visit"]).write(tmp_path / "framed.parquet")
    assert pyarrow.parquet.read_table(framed).column("visit").to_pylist() == [3, 4]

    out, asked = tmp_path / "out.csv", (run.folder, "--data", tmp_path / "new.csv", "--id", "id")
    found = command("predict", *asked, "--out", out)
    assert found.exit_code == 0, found.stderr
    with out.open(newline="") as lines:
        assert [row["id"] for row in csv.DictReader(lines)] == ["0012", "0013"]
    table = command("predict", *asked)
    assert "0012" in table.stdout and "id" in table.stdout


@pytest.mark.parametrize(
    ("name", "column", "said"),
    [
        ("new.jsonl", "mrn", "no column 'mrn', which --id mrn names; expected one of 'note', 'id'"),
        ("new.jsonl", "reason", "--id reason: the predictions already have a column of this name"),
        ("new.jsonl", "probability.a", "the predictions already have a column of this name"),
        ("new.txt", "id", "lines of text have no columns, and this run reads text, --id id"),
    ],
)
def test_a_column_that_cannot_go_with_them_is_named(
    run: fedtune.Run, tmp_path: Path, name: str, column: str, said: str
) -> None:
    (tmp_path / name).write_text(json.dumps({"note": "a", "id": 1}) + "\n")
    found = command("predict", run.folder, "--data", tmp_path / name, "--id", column)
    assert found.exit_code == 2 and said in found.stderr, found.stderr
