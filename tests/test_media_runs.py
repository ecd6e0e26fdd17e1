"""A whole study on images, one on recordings and one on clips: simulate, report, evaluate,
generate, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from tests.depth import long_but
from tests.media import film, idefics3, image, qwen2_vl, recording, whisper

STUDY = """
[study]
name = "tiny"
[base]
model = "{base}"
dtype = "float32"
{modality}
[lora]
rank = 2
alpha = 4
modules = {modules}
[objective]
name = "causal_lm"
max_length = {length}
[training]
rounds = 2
sampling_rate = 1.0
learning_rate = 0.1
[clipping]
max_grad_norm = 1.0
[privacy]
epsilon = 8.0
delta = 1e-3
[evaluation]
path = "{place}/data.jsonl"
metric = "accuracy"
choices = [" yes", " no"]
columns = {columns}
"""
SITE = """
[site]
name = "{name}"
declared_size = {size}
state = "state-{name}"
[data]
path = "{place}/data.jsonl"
columns = {columns}
[policy]
bases = "any"
"""


RECORDS = 10
MADE = {"image": (".png", image), "audio": (".wav", recording), "video": (".avi", film)}
BASES = {"image": idefics3, "image on a square": qwen2_vl, "audio": whisper, "video": idefics3}


@pytest.fixture(params=long_but(["audio"], BASES))
def study(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    kind, place = str(request.param).split()[0], tmp_path / "records"
    suffix, make = MADE[kind]
    base = BASES[request.param](tmp_path / "base")
    rows = []
    for number in range(RECORDS):
        made = make(place / f"{number}{suffix}", number)
        rows.append({"file": made, "q": "a mass?", "a": [" yes", " no"][number % 2]})
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = f'{{ {kind} = "file", prompt = "q", completion = "a" }}'
    columns = '{ audio = "file", text = "a" }' if kind == "audio" else ask
    modules = '["q_proj", "fc1"]' if kind == "audio" else '["q_proj", "projector"]'
    modality = 'modality = "video_text"' if kind == "video" else ""
    (tmp_path / "sites").mkdir()
    for name in ("north", "south"):
        site = SITE.format(name=name, place=place, columns=columns, size=RECORDS)
        (tmp_path / "sites" / f"{name}.toml").write_text(site)
    path = tmp_path / "study.toml"
    texts = {"modality": modality, "modules": modules, "columns": columns}
    texts["length"] = 160 if kind == "video" else 64
    path.write_text(STUDY.format(base=base, place=place, **texts))
    monkeypatch.chdir(tmp_path)
    return path


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(a) for a in arguments])
    return found.exit_code, found.output + found.stderr


def test_from_simulate_to_generate(study: Path) -> None:
    code, said = run("simulate", study, "--sites", "sites")
    assert code == 0, said
    folder, records = Path("runs/tiny"), study.parent / "records"
    body = json.loads((folder / "report.json").read_text())
    assert body["private"] and 7 < body["privacy"]["epsilon"] <= 8
    code, said = run("evaluate", folder, "--data", records / "data.jsonl")
    assert code == 0 and f"{RECORDS} records" in said, said
    accuracy = body["quality"]["after"]["accuracy"]
    code, said = run("predict", folder, "--data", records / "data.jsonl", "--json")
    rows = json.loads(said)["predictions"]
    right = [row["prediction"] == ["yes", "no"][n % 2] for n, row in enumerate(rows)]
    assert code == 0 and sum(right) == round(RECORDS * accuracy), said
    file = min(path for path in records.iterdir() if path.suffix != ".jsonl")
    ask = () if file.suffix == ".wav" else ("--prompt", "a mass?")
    code, said = run("generate", folder, "--file", file, *ask, "--max-new-tokens", 3, "--plain")
    assert code == 0 and "with the adapter" in said, said
    code, said = run("generate", folder, "--prompt", "a mass?")
    assert code == 2 and "--file" in said
    code, said = run("generate", folder, "--file", "none.png")
    assert code == 2 and "no such file" in said
    shutil.copy(study, "broken")
    code, said = run("generate", folder, "--file", "broken")
    assert code == 2 and ("unreadable" in said or "no PCM WAV" in said)
