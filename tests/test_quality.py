"""Quality against plain transformers, one record at a time; runs read back and measured again."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.core.config import Columns, DataFile, Study
from fedtune.core.data.dataset import NO_TARGET, Dataset, Example
from fedtune.core.errors import ConfigError, DataError, InputError, ModelError
from fedtune.core.models.build import build
from fedtune.core.models.lora import Arrays
from fedtune.core.models.network import Network
from fedtune.evaluation.evaluator import Evaluator, _choice_tokens, check_evaluation
from fedtune.evaluation.generate import generate
from fedtune.evaluation.metrics import intervals, wilson
from fedtune.evaluation.run import evaluate
from fedtune.runs.run import Run
from fedtune.server.parts import Dependencies

PROMPTS = ("The patient was seen with", "Blood pressure", "Question: does aspirin", "No acute")
ANSWERS = (" yes", " no", " maybe", " yes", " fever and a cough", " no")


def study_of(
    base: Path, file: Path, metric: str, choices: tuple[str, ...] = (), **more: Any
) -> Study:
    body: dict[str, Any] = {
        "study": {"name": "tiny"},
        "base": {"model": str(base), "dtype": "float32"},
        "lora": {"rank": 4, "last_layers": 2},
        "objective": {"name": "causal_lm", "max_length": 64},
        "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        "privacy": "off",
        "evaluation": {
            "path": str(file),
            "columns": {"prompt": "prompt", "completion": "completion"},
            "metric": metric,
            "choices": list(choices),
        },
    }
    return Study.model_validate_json(json.dumps(body | more))


def records(path: Path, answers: tuple[str, ...]) -> list[dict[str, str]]:
    rows = [
        {"prompt": f"{PROMPTS[i % len(PROMPTS)]} {i}:", "completion": answers[i % len(answers)]}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def adapter_of(network: Network, seed: int = 1) -> Arrays:
    random = np.random.default_rng(seed)
    return {
        name: random.normal(0, 0.5, value.shape).astype(np.float32)
        for name, value in sorted(network.trainable().items())
    }


def plain(
    base: Path, rows: list[dict[str, str]], end: bool = True
) -> list[tuple[float, int, bool]]:
    """(summed loss, tokens, all greedy) of each record by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
        target = tokenizer.encode(row["completion"], add_special_tokens=False)
        target += [tokenizer.eos_token_id] * end
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])
        found.append((-chosen.sum().item(), len(target), logits.argmax(-1).tolist() == target))
    return found


def test_loss_and_perplexity_are_those_of_plain_transformers(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = records(tmp_path / "e.jsonl", ANSWERS)
    evaluator = Evaluator(study_of(tiny_base, tmp_path / "e.jsonl", "perplexity"))
    found, expected = evaluator.measure(None), plain(tiny_base, rows)
    assert found["loss"] == pytest.approx(np.mean([s / n for s, n, _ in expected]), rel=1e-4)
    total, tokens = sum(s for s, _, _ in expected), sum(n for _, n, _ in expected)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert found["perplexity"] != pytest.approx(math.exp(found["loss"]), rel=1e-6)


def test_exact_match_is_what_greedy_decoding_writes(tiny_base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = records(tmp_path / "e.jsonl", ANSWERS)
    right = 0
    for row in rows[::2]:  # every second completion is what the base itself would write
        ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        new = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[
            0, ids.shape[1] :
        ]
        text = tokenizer.decode(new)
        if tokenizer.encode(text, add_special_tokens=False) == new.tolist() and text.isprintable():
            row["completion"], right = text, right + 1
    assert right
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = {"name": "causal_lm", "max_length": 64, "append_eos": False}
    study = study_of(tiny_base, tmp_path / "e.jsonl", "exact_match", objective=objective)
    found = Evaluator(study).measure(None)["exact_match"]
    assert found == pytest.approx(np.mean([hit for _, _, hit in plain(tiny_base, rows, False)]))
    assert found == pytest.approx(right / len(rows))


def test_the_next_run_in_a_process_finds_public_records_read(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of two files; a record that was added meanwhile is read alone."""
    studies = []
    for name in "esx":
        records(tmp_path / f"{name}.jsonl", (f" {name}", *ANSWERS))
        studies.append(study_of(tiny_base, tmp_path / f"{name}.jsonl", "loss"))
    first = [Evaluator(study).measure(None) for study in studies[:2]]
    with (tmp_path / "e.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "One more:", "completion": " yes"}) + "\n")
    gc.collect()
    network, seen = build(studies[0]), list[int]()
    honest = network.prefix

    def counted(ids: torch.Tensor, *given: Any) -> torch.Tensor:
        seen.append(len(ids))
        return honest(ids, *given)

    monkeypatch.setattr(network, "prefix", counted)
    again = [Evaluator(study).measure(None) for study in studies[:2]]
    assert len(seen) == 1 and again[1] == first[1] and again[0] != first[0]
    Evaluator(studies[2])  # a third file: the oldest goes
    gc.collect()
    seen.clear()
    Evaluator(studies[0])
    assert len(seen) > 1


@pytest.mark.parametrize("answers", [("a", "b", "c"), (" yes", " no", " perhaps so")])
def test_accuracy_takes_the_choice_of_highest_likelihood(
    tiny_base: Path, tmp_path: Path, answers: tuple[str, ...]
) -> None:
    rows = records(tmp_path / "e.jsonl", answers)
    evaluator = Evaluator(study_of(tiny_base, tmp_path / "e.jsonl", "accuracy", answers))
    assert (evaluator._single is not None) == (len(answers[0]) == 1)
    scores = evaluator.scores(None)
    spelled = [{**row, "completion": answer} for row in rows for answer in answers]
    loss = np.array([s for s, _, _ in plain(tiny_base, spelled, end=False)])
    np.testing.assert_array_equal(scores.chosen, loss.reshape(len(rows), -1).argmin(axis=1))
    assert [answers[k] for k in scores.gold] == [row["completion"] for row in rows]
    assert evaluator.measure(None)["accuracy"] == np.mean(scores.chosen == scores.gold)


def test_the_adapter_counts_and_the_network_is_left_as_it_was(
    tiny_base: Path, tmp_path: Path
) -> None:
    records(tmp_path / "e.jsonl", ANSWERS)
    evaluator = Evaluator(study_of(tiny_base, tmp_path / "e.jsonl", "loss"))
    network, one, two = evaluator.network, *(adapter_of(evaluator.network, s) for s in (1, 2))
    base = evaluator.measure(None)
    network.load_trainable(one)
    try:
        assert evaluator.measure(two)["loss"] != pytest.approx(base["loss"], abs=1e-4)
        assert evaluator.measure(None) == base
        for name, value in network.trainable().items():
            np.testing.assert_array_equal(value, one[name])
        with pytest.raises(ModelError):
            evaluator.measure({})
        np.testing.assert_array_equal(network.trainable()[name], one[name])
    finally:
        network.load_trainable({name: 0 * value for name, value in one.items()})


def test_states_at_the_cut_are_computed_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records(tmp_path / "e.jsonl", (" yes", " no", " perhaps so"))
    study = study_of(tiny_base, tmp_path / "e.jsonl", "f1", (" yes", " no", " perhaps so"))
    evaluator = Evaluator(study)
    monkeypatch.setattr(Network, "prefix", lambda *_: pytest.fail("the frozen part ran again"))
    first = evaluator.measure(None)
    assert evaluator.measure(None) == first and 0 <= first["f1"] <= 1


def test_a_classifier_is_measured_by_its_head(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{PROMPTS[i % 4]} {i}", "label": ("north", "south")[i % 3 == 0]}
        for i in range(20)
    ]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = study_of(
        tiny_encoder, tmp_path / "e.jsonl", "f1",
        lora=None,
        objective={"name": "classify", "max_length": 64, "labels": ["north", "south", "east"]},
        evaluation={"path": str(tmp_path / "e.jsonl"), "metric": "f1",
                    "columns": {"text": "text", "label": "label"}},
    )  # fmt: skip
    evaluator = Evaluator(study)
    found = evaluator.measure(None)  # a head of zeros: every class alike, the first is taken
    share = np.mean([row["label"] == "north" for row in rows])
    assert found["loss"] == pytest.approx(math.log(3), rel=1e-5)
    assert found["f1"] == pytest.approx((2 * share / (1 + share)) / 2)
    head = {name: np.zeros_like(v) for name, v in evaluator.network.trainable().items()}
    head["head.bias"][1] = 5.0
    scores = evaluator.scores(head)
    assert set(scores.chosen) == {1} and scores.value("accuracy") == pytest.approx(1 - share)
    with pytest.raises(ConfigError, match="does not fit objective classify"):
        table = study.evaluation
        assert table
        wrong = table.model_copy(update={"metric": "perplexity"})
        Evaluator(study.model_copy(update={"evaluation": wrong}))


def test_what_cannot_be_measured_says_why(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.jsonl"
    records(file, ANSWERS)
    with pytest.raises(ConfigError, match=r"no \[evaluation\] table"):
        Evaluator(study_of(tiny_base, file, "loss").model_copy(update={"evaluation": None}))
    with pytest.raises(ConfigError, match=r"needs evaluation\.choices"):
        Evaluator(study_of(tiny_base, file, "accuracy"))
    with pytest.raises(ConfigError, match="two choices have the same tokens"):
        Evaluator(study_of(tiny_base, file, "accuracy", (" yes", " yes")))
    with pytest.raises(DataError, match="of 24 completions are none of") as caught:
        Evaluator(study_of(tiny_base, file, "accuracy", (" yes", " no")))
    assert "fever" not in str(caught.value) and "maybe" not in str(caught.value)


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> tuple[Path, Study, Arrays]:
    records(tmp_path / "e.jsonl", ANSWERS)
    study = study_of(tiny_base, tmp_path / "e.jsonl", "loss")
    network = build(study)
    start, adapter = network.trainable(), adapter_of(network)
    network.load_trainable(adapter)
    network.save(tmp_path / "run" / "adapter")
    network.load_trainable(start)
    (tmp_path / "run" / "plan.json").write_text(study.model_dump_json())
    return tmp_path / "run", study, adapter


def test_a_run_is_evaluated_from_its_folder(
    run: tuple[Path, Study, Arrays], tmp_path: Path
) -> None:
    folder, study, adapter = run
    columns = Columns(prompt="prompt", completion="completion")
    found = evaluate(Run(folder), DataFile(path=tmp_path / "e.jsonl", columns=columns))
    evaluator = Evaluator(study)
    assert found["metric"] == "loss" and found["records"] == 24
    assert found["before"] == evaluator.measure(None)
    assert found["after"] == evaluator.measure(adapter) != found["before"]
    for name in ("before", "after"):
        low, high = found["interval"][name]
        assert low < found[name]["loss"] < high
    low, high = found["interval"]["change"]
    assert low < found["after"]["loss"] - found["before"]["loss"] < high
    with pytest.raises(InputError, match="not a run folder"):
        evaluate(Run(tmp_path), DataFile(path=tmp_path / "e.jsonl", columns=columns))
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no adapter"):
        evaluate(Run(folder), DataFile(path=tmp_path / "e.jsonl", columns=columns))


def test_base_and_adapter_write_side_by_side(
    run: tuple[Path, Study, Arrays], tiny_base: Path
) -> None:
    folder, _, _ = run
    before, after = generate(Run(folder), PROMPTS[0], max_new_tokens=8)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def write(model: Any, chat: bool) -> str:
        ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
        if chat:
            turn = [{"role": "user", "content": PROMPTS[0]}]
            ids = tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    assert before == write(model, False)
    chatted = generate(Run(folder), PROMPTS[0], 8, chat=True)[0]
    assert chatted == write(model, True)
    adapted = PeftModel.from_pretrained(model, str(folder / "adapter"))
    assert after == write(adapted, False) != before


def test_intervals() -> None:
    low, high = wilson(0.8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    low, high = wilson(0.0, 20)
    assert abs(low) < 1e-12 and high == pytest.approx(0.1611, abs=1e-4)
    from fedtune.report.scores import Scores

    def scores(chosen: list[int]) -> Scores:
        n = len(chosen)
        rest = (np.ones(n), np.ones(n), np.zeros(n, bool))
        return Scores(*rest, np.array(chosen), np.arange(n) % 3, np.zeros(n))

    never, always = scores([3] * 90), scores([0, 1, 2] * 30)
    assert intervals(never, always, "accuracy")["change"] == (1.0, 1.0)
    assert intervals(never, always, "accuracy")["after"][0] < 1
    assert always.value("f1") == 1.0 and never.value("f1") == 0.0


def without_weights(base: Path, folder: Path) -> Path:
    """The base as far as its tokenizer: who needs more than that has looked too late."""
    shutil.copytree(base, folder)
    save_file({"nothing": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder


def test_choices_are_checked_before_the_base_is_loaded(tmp_path: Path, tiny_base: Path) -> None:
    file = tmp_path / "eval.jsonl"
    records(file, (" yes", " no", " maybe"))
    base = without_weights(tiny_base, tmp_path / "base")
    study = study_of(base, file, "accuracy", (" yes", " no"))
    for check in (check_evaluation, Dependencies().start):
        with pytest.raises(DataError, match="8 of 24 completions are none"):
            check(study)
    check_evaluation(study_of(base, file, "accuracy", (" yes", " no", " maybe")))


@pytest.mark.parametrize(
    ("kept", "says"),
    [(2, "max_length = 12 cuts 1 of 2"), (9, "1 of 2 completions are none of evaluation.choices")],
)
def test_an_answer_that_was_cut_off_is_not_called_a_wrong_one(
    tiny_base: Path, kept: int, says: str
) -> None:
    """The whole answer, and its first two tokens at the end of max_length; or as many others."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    choices = (" fever and a cough", " nothing of the kind")
    whole, other = (tokenizer.encode(choice, add_special_tokens=False) for choice in choices)
    assert len(whole) > 2

    def example(answer: list[int], length: int) -> Example:
        ids = [3] * (length - len(answer)) + answer
        targets = [NO_TARGET] * (length - len(answer) - 1) + answer
        return Example(np.array(ids[:-1], np.int32), np.array(targets, np.int32), NO_TARGET, 0)

    second = whole[:2] if kept == 2 else other[::-1][:9]
    data = Dataset([example(whole, 40), example(second, 12)], 2, Counter())
    with pytest.raises(DataError, match=says):
        _choice_tokens(tokenizer, data, choices, 12)


def test_columns_are_checked_before_the_base_is_loaded(tmp_path: Path, tiny_base: Path) -> None:
    file = tmp_path / "eval.jsonl"
    file.write_text('{"question": "a", "completion": " yes"}\n')
    study = study_of(without_weights(tiny_base, tmp_path / "base"), file, "loss")
    with pytest.raises(DataError, match="no column 'prompt'"):
        Dependencies().start(study)


def test_selection_records_are_checked_before_the_base_is_loaded(
    tmp_path: Path, tiny_base: Path
) -> None:
    """As the evaluation records are: a completion that is no choice shows in seconds."""
    files = tmp_path / "eval.jsonl", tmp_path / "selection.jsonl"
    records(files[0], (" yes", " no"))
    columns = {"prompt": "prompt", "completion": "completion"}
    selection = {"path": str(files[1]), "columns": columns}
    base = without_weights(tiny_base, tmp_path / "base")
    study = study_of(base, files[0], "accuracy", (" yes", " no"), selection=selection)
    for line, says in (
        ('{"question": "a", "completion": " yes"}', "selection.columns.prompt"),
        ('{"prompt": "a", "completion": " perhaps"}', "none of evaluation.choices"),
    ):
        files[1].write_text(f"{line}\n")
        with pytest.raises(DataError, match=says):
            Dependencies().start(study)


def test_white_space_after_a_choice_does_not_count_unless_it_tells_two_apart(
    tmp_path: Path, tiny_base: Path
) -> None:
    file = tmp_path / "eval.jsonl"
    records(file, (" yes", " no \n"))
    check_evaluation(study_of(tiny_base, file, "accuracy", (" yes", " no")))
    with pytest.raises(DataError, match="12 of 24 completions are none"):
        check_evaluation(study_of(tiny_base, file, "accuracy", (" no", " no ", " yes")))
    with pytest.raises(DataError, match="spaces at its start included"):
        check_evaluation(study_of(tiny_base, file, "accuracy", ("yes", "no")))
