"""Finished runs into a smaller student: it learns what they say, carries what they cost over, and
loads in plain transformers and PEFT."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fedtune.core.bases.find import find_base
from fedtune.core.config import Columns, LoraTable, PublicTable
from fedtune.core.data.records import Record
from fedtune.core.errors import ConfigError, InputError
from fedtune.core.models.loaded import load
from fedtune.core.models.network import Network
from fedtune.core.models.teacher import soft_targets_of
from fedtune.core.objectives._interface import Teacher
from fedtune.core.run_folder import load_plan
from fedtune.core.wire.keys import SigningKey
from fedtune.derive.distill import _student_lora, distill
from fedtune.derive.pruned_base import write_pruned_base
from fedtune.derive.settings import DistillSettings
from fedtune.evaluation.generate import generate
from fedtune.evidence.sign import sign_files
from fedtune.runs.run import Run
from tests.dp.conftest import study
from tests.simulated import simulate
from tests.test_cli import run
from tests.test_end_to_end import lay_out

QUICK = DistillSettings(rank=4, epochs=15, batch=8, learning_rate=1e-2, new_tokens=3)


def prompts(folder: Path, count: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "public.jsonl"
    rows = [{"prompt": f"fever day {n}", "completion": "y"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path: Path, **columns: str) -> PublicTable:
    named = columns or {"prompt": "prompt", "completion": "completion"}
    return PublicTable(path=path, columns=Columns(**named), licence="CC0-1.0")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A finished private run whose adapter was then moved far from the base: a teacher that says
    something of its own."""
    folder = tmp_path_factory.mktemp("teacher")
    path = lay_out(folder, tiny_base, "{ epsilon = 3.0, delta = 1e-3, unit = 'patient' }")
    simulate(path, sorted(folder.glob("site-*.toml")), folder / "run")
    file = folder / "run" / "adapter" / "adapter_model.safetensors"
    arrays = load_file(file)
    generator = torch.Generator().manual_seed(5)
    for name, value in arrays.items():
        arrays[name] = torch.randn(value.shape, generator=generator) * 0.5
    save_file(arrays, file, {"format": "pt"})
    sign_files(folder / "run", SigningKey())
    return folder / "run"


def test_a_student_with_fewer_layers_learns_its_teacher(tmp_path: Path, teacher: Path) -> None:
    body = distill(
        [Run(teacher)], table(prompts(tmp_path)), tmp_path / "out", layers=3, settings=QUICK
    ).report
    before, after = (body["quality"][key]["divergence"] for key in ("before", "after"))
    assert after < 0.3 * before
    parent = json.loads((teacher / "report.json").read_text())
    assert body["private"] and body["privacy"]["epsilon"] == pytest.approx(
        parent["privacy"]["epsilon"], rel=1e-3
    )
    said = (tmp_path / "out" / "report.md").read_text()
    for words in ("cost no ε", "CC0-1.0", body["derived"]["prompts"]["digest"], "distilled"):
        assert words in said, words
    assert not list(tmp_path.glob("*.new"))


def test_it_loads_in_plain_transformers_and_peft_and_says_the_same(
    tmp_path: Path, teacher: Path
) -> None:
    out = tmp_path / "out"
    distill([Run(teacher)], table(prompts(tmp_path)), out, layers=3, settings=QUICK)
    plain: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(out / "base"), str(out / "adapter")
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(out / "base")
    inputs = tokenizer("fever day 3", return_tensors="pt")
    written = plain.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
        max_new_tokens=4, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert written.shape[1] > inputs["input_ids"].shape[1]
    ours = load(out)
    ids = inputs["input_ids"][0].numpy()
    with torch.no_grad():
        theirs = torch.log_softmax(plain(input_ids=inputs["input_ids"]).logits[0, -1], dim=0)
    found = ours.next_tokens(ids, np.array([len(ids) - 1]))[0]
    np.testing.assert_allclose(theirs.numpy(), found.numpy(), atol=1e-4)
    assert generate(Run(out), "fever day 3", 3) and load_plan(out).base.digest == ours.base.digest
    moved = tmp_path / "elsewhere"
    shutil.move(out, moved)
    assert load(moved).digest == ours.digest  # a run's own base goes where the run goes


def test_several_teachers_are_heard_as_their_mean(tmp_path: Path, teacher: Path) -> None:
    one = load(teacher)
    base = load(str(one.base.path))
    assert one.study is not None
    ids = np.array(one.tokenizer.encode("fever day 3"), np.int32)
    from fedtune.core.data.dataset import Example

    targets = np.full(len(ids), -100, np.int32)
    targets[-1] = 5
    example = Example(ids, targets, -100, 0)
    both = soft_targets_of([one, base], one.study.objective, Teacher("", "", 1.0, 10_000))
    soft = both(Record(""), example)
    at = np.array([len(ids) - 1])
    mean = (one.next_tokens(ids, at).exp() + base.next_tokens(ids, at).exp()) / 2
    expected = mean[0, torch.from_numpy(soft.tokens[0].astype(np.int64))]
    np.testing.assert_allclose(np.exp(soft.logp[0]), expected.numpy(), atol=1e-5)


def test_a_classifier_teaches_a_smaller_one(tmp_path: Path, tiny_encoder: Path) -> None:
    """An encoder with a head, of two layers; the student has the same two, but another body."""
    labels = ("yes", "no", "maybe")
    objective = {"name": "classify", "labels": list(labels), "max_length": 64}
    made = study(base={"model": str(tiny_encoder)}, lora=None, objective=objective)
    network = Network(find_base(str(tiny_encoder)), torch.float32, None, 3)
    draw = np.random.default_rng(0)
    network.load_trainable(
        {n: draw.normal(size=a.shape).astype(np.float32) for n, a in network.trainable().items()}
    )
    teacher = tmp_path / "teacher"
    network.save(teacher / "adapter")
    (teacher / "plan.json").write_text(made.model_dump_json())
    (teacher / "report.json").write_text(json.dumps({"private": False, "privacy": {}}))
    path = prompts(tmp_path)
    out = tmp_path / "out"
    body = distill(
        [Run(teacher)], table(path, text="prompt"), out, student=str(tiny_encoder), settings=QUICK
    ).report
    assert body["quality"]["after"]["divergence"] < 0.5 * body["quality"]["before"]["divergence"]
    assert not body["private"] and "NOT PRIVATE" in (out / "report.md").read_text()
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_encoder), str(out / "adapter"))
    assert plain is not None and load(out).head is not None


def test_fewer_layers_are_the_first_ones_and_the_last(tmp_path: Path, tiny_base: Path) -> None:
    base = find_base(str(tiny_base))
    assert write_pruned_base(base, 3, tmp_path / "small") == [0, 1, 3]
    whole: Any = AutoModelForCausalLM.from_pretrained(tiny_base)
    small: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    for ours, theirs in ((0, 0), (1, 1), (2, 3)):
        one = small.model.layers[ours].mlp.up_proj.weight
        assert torch.equal(one, whole.model.layers[theirs].mlp.up_proj.weight)
    with pytest.raises(ConfigError, match="has 4"):
        write_pruned_base(base, 4, tmp_path / "same")


def changed(run: Path, out: Path, seed: int) -> Path:
    """A copy of a run that says something else: other values in its adapter."""
    shutil.copytree(run, out)
    file = out / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    arrays = {n: torch.randn(v.shape, generator=generator) for n, v in load_file(file).items()}
    save_file(arrays, file, {"format": "pt"})
    sign_files(out, SigningKey())
    return out


def test_the_students_base_heard_no_teacher(tmp_path: Path, teacher: Path) -> None:
    """It is a function of the teacher's base and the prompts: two teachers that say other things
    leave the same bytes. Each writes its own answers, which are not in it."""
    path = prompts(tmp_path)
    path.write_text("".join(json.dumps({"prompt": f"fever day {n}"}) + "\n" for n in range(32)))
    other = changed(teacher, tmp_path / "other", 7)
    digests = []
    for run_, out in ((teacher, tmp_path / "one"), (other, tmp_path / "two")):
        quick = replace(QUICK, epochs=0)
        body = distill(
            [Run(run_)], table(path, prompt="prompt"), out, layers=3, settings=quick
        ).report
        digests.append(body["base"]["digest"])
    assert digests[0] == digests[1]
    kept = body["derived"]["settings"]["layers"]
    assert kept in ("0, 2, 3", "0, 1, 3") and kept in (tmp_path / "two" / "report.md").read_text()


def test_it_begins_where_its_teacher_stands(tmp_path: Path, tiny_base: Path) -> None:
    """Where what is left out did nothing, the student says the teacher's word before it learns."""
    whole: Any = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        for part in (whole.model.layers[2].self_attn.o_proj, whole.model.layers[2].mlp.down_proj):
            part.weight.zero_()
        whole.model.embed_tokens.weight.mul_(20)  # else it hardly prefers any word
    whole.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "base")
    lora = {"rank": 3, "alpha": 5.0, "modules": ["up_proj", "down_proj"], "variant": "rslora"}
    made = study(base={"model": str(tmp_path / "base")}, lora=lora)
    assert made.lora is not None
    network = Network(find_base(str(tmp_path / "base")), torch.float32, made.lora, 0)
    draw = np.random.default_rng(0)
    arrays = {
        n: draw.normal(size=a.shape).astype(np.float32) * (".layers.2." not in n)
        for n, a in network.trainable().items()
    }
    network.load_trainable(arrays)
    run_ = tmp_path / "teacher"
    network.save(run_ / "adapter")
    (run_ / "plan.json").write_text(made.model_dump_json())
    (run_ / "report.json").write_text(json.dumps({"private": False, "privacy": {}}))
    quick = replace(QUICK, rank=None, epochs=0)
    body = distill(
        [Run(run_)], table(prompts(tmp_path)), tmp_path / "out", layers=3, settings=quick
    ).report
    assert body["derived"]["settings"]["layers"] == "0, 1, 3"
    before, start = (body["quality"][key]["divergence"] for key in ("before", "after"))
    assert before > 0.1 > 100 * start
    lora = load_plan(tmp_path / "out").lora
    assert lora is not None and (lora.rank, lora.modules) == (3, ("up_proj", "down_proj"))


def test_what_cannot_teach_is_refused_and_leaves_nothing(
    tmp_path: Path, teacher: Path, tiny_base: Path
) -> None:
    file, out = table(prompts(tmp_path)), tmp_path / "out"
    with pytest.raises(ConfigError, match="exactly one"):
        distill([Run(teacher)], file, out, settings=QUICK)
    with pytest.raises(InputError, match="not a run folder"):
        distill([Run(tiny_base)], file, out, layers=3, settings=QUICK)
    with pytest.raises(ConfigError, match="has 4"):
        distill([Run(teacher)], file, out, layers=9, settings=QUICK)
    assert {p.name for p in tmp_path.iterdir()} == {"public.jsonl"}


def test_a_stop_leaves_nothing(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedtune.derive.distill as module

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_train_student", stop)
    told = run(
        "distill", teacher, "--prompts", prompts(tmp_path), "--licence", "CC0-1.0",
        "--layers", "3", "--out", tmp_path / "out", "--new-tokens", "2",
    )  # fmt: skip
    assert told.exit_code == 130
    assert {p.name for p in tmp_path.iterdir()} == {"public.jsonl"}


def test_the_command(tmp_path: Path, teacher: Path) -> None:
    told = run(
        "distill", teacher, "--prompts", prompts(tmp_path, 12), "--licence", "CC0-1.0",
        "--layers", "3", "--out", tmp_path / "out", "--epochs", "2", "--new-tokens", "2",
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert "divergence" in told.output and (tmp_path / "out" / "progress.png").exists()
    assert run("distill", "--help").exit_code == 0


def test_its_adapter_sits_where_its_teachers_sat(tiny_base: Path) -> None:
    """In those of the teacher's last layers that stayed; another place only if it is asked for."""
    base, taught = find_base(str(tiny_base)), LoraTable(rank=3, modules=("up_proj",), last_layers=3)
    kept = [0, 1, 2, 3, 4, 6, 7]  # of eight
    found = _student_lora(base, taught, kept, DistillSettings())
    assert (found.rank, found.modules, found.last_layers) == (3, ("up_proj",), 2)
    asked = _student_lora(base, taught, kept, DistillSettings(rank=5, last_layers=0))
    assert asked.rank == 5 and asked.last_layers is None and "q_proj" in asked.modules
    assert _student_lora(base, taught, None, DistillSettings()).last_layers is None
