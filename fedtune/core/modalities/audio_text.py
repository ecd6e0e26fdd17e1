"""Read a recording and its transcript, for Whisper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedtune.core.bases.digest import unchanged
from fedtune.core.bases.find import Base
from fedtune.core.config import ObjectiveTable
from fedtune.core.data.files import Rejected
from fedtune.core.data.media import Media, keep_samples, length, sound
from fedtune.core.data.records import Record
from fedtune.core.errors import ModelError
from fedtune.core.modalities._interface import Modality

SPACED = "\u0e00"  # scripts from Thai on mostly have no spaces between words
_START = "<|startoftranscript|>"


class Speech:
    """Reads recordings and their transcripts. A recording that is longer than the base's window is
    cut, or rejected if objective.overflow is "reject"; one of more than 30 s (media.SECONDS) is
    always rejected. A transcript that begins with a letter or digit of a script with spaces between
    words gets a space in front, as in Whisper's own transcripts."""

    column: Literal["audio"] = "audio"
    starts = True
    avoid: frozenset[int] = frozenset()

    def __init__(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
        self._extractor: Any = _extractor(base)
        self._rate = int(self._extractor.sampling_rate)
        self._start = _start(tokenizer)

    def place(self, record: Record, objective: ObjectiveTable) -> tuple[Record, int]:
        if record.media is None:
            raise Rejected("missing value")
        if record.prompt and objective.resolved.record_format != "label":
            raise Rejected("a speech base takes no prompt")
        # `length`, since `sound` takes long, and any number of records may name one recording.
        samples = length(record.media, self._rate)
        if samples > self._extractor.n_samples and objective.overflow == "reject":
            raise Rejected("audio too long")
        said = record.completion
        if said[:1].isalnum() and said[:1] < SPACED:
            said = f" {said}"
        return replace(record, prompt=self._start, completion=said), 1

    def check(self, ids: list[int], tiles: int) -> None: ...

    def tensor(self, media: Media) -> torch.Tensor:
        """Compute the log-mel spectrogram of a recording, (1, mel bins, frames)."""
        samples = sound(media, self._rate)
        features = self._extractor(samples, sampling_rate=self._rate, return_tensors="np")
        return torch.from_numpy(np.asarray(features["input_features"], dtype=np.float32))

    def generated(self, draw: np.random.Generator, like: Media | None = None) -> Media | None:
        """Generate a recording of white noise with a tone in it, a fifth of a second to one second
        long. draw: the source of the noise; like: not used."""
        count = int(self._rate * draw.uniform(0.2, 1.0))
        tone = np.sin(np.arange(count) * draw.uniform(0.05, 1.0))
        values = (8000 * tone + 4000 * draw.standard_normal(count)).clip(-32768, 32767)
        samples = (np.trunc(values) / 32768).astype(np.float32)
        return Media.of("audio", keep_samples(samples, self._rate))


@dataclass(frozen=True)
class AudioText(Modality):
    """Reads a recording and its transcript, for Whisper.

    The feature extractor in the base's folder makes log-mel spectrograms of one length. The
    decoder's text is Whisper's start tokens and then the transcript, if there is one."""

    kinds = ("speech",)

    def reader(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> Speech:
        return Speech(base, tokenizer)


def _start(tokenizer: Any) -> str:
    """Return WhisperTokenizer's start tokens of a decoder's text, joined to one text."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    known, asked = tokenizer.get_vocab(), tokenizer.init_kwargs
    if _START not in known:
        return str(tokenizer.bos_token)
    language = str(asked.get("language")).lower()
    tokens = [_START, f"<|{TO_LANGUAGE_CODE.get(language, language)}|>", f"<|{asked.get('task')}|>"]
    tokens += [] if asked.get("predict_timestamps") else ["<|notimestamps|>"]
    return "".join(token for token in tokens if token in known)


def _extractor(base: Base) -> Any:
    import transformers

    try:
        auto: Any = transformers.AutoFeatureExtractor
        with unchanged(base.path, base.digest):
            return auto.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{base.name}: transformers cannot load its feature extractor ({type(error).__name__})",
            "preprocessor_config.json in the base's folder",
        ) from error
