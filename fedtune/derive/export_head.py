"""Export a run that trained a head, as a transformers folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedtune.core.bases.find import Base
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.models.adapter_files import AGAIN
from fedtune.core.models.loaded import LoadedModel, load
from fedtune.core.run_folder import HEAD
from fedtune.derive.classifier import classifier_of
from fedtune.runs.run import Run

# Texts on which a classifier's logits are compared with the run's before it is kept.
TEXTS = ("No.", "The patient was seen with a cough for two weeks.", "1, 2, 3: what is it? " * 3)
CLOSE = 1e-4  # largest difference of logits, as a share of 1 + the largest logit

PIPELINE = """\
```python
from transformers import pipeline

classify = pipeline("text-classification", model="THIS FOLDER")
print(classify("A text.", truncation=True{more}))
```
"""
BY_HAND = """\
transformers has no classifier that computes what this head does, so that the head is a file beside
the base:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder, labels = "THIS FOLDER", {labels}
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
model = AutoModel.from_pretrained(folder).eval()
head = load_file(folder + "/head.safetensors")
batch = tokenizer(["A text."], return_tensors="pt", padding=True, truncation=True)
with torch.no_grad():
    states = model(**batch).last_hidden_state
mask = batch["attention_mask"]
{pool}
logits = features @ head["weight"].T + head["bias"]
```
"""
MEAN = """\
mean = (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
features = torch.nn.functional.normalize(mean) * mean.shape[1] ** 0.5"""
LAST = "features = states[torch.arange(len(states)), mask.sum(dim=1) - 1]"
WIDENED = (
    "Its encoder is twice as wide as the base and has a layer more: so a plain BERT classifier "
    "computes this head, which reads the mean over tokens at unit length. It takes two to three "
    "times the base's time and memory; `fedtune predict` takes the base's."
)
ONE_MORE = "It has a layer more than the base, which holds the head: transformers' own has no bias."
REWARD = (
    "The one logit is the score of an answer. The text is the prompt{template}, the answer, and "
    "the token {eos}. Training made tokens of prompt and answer apart: an answer that begins a "
    "word brings its own space, and the prompt ends without one, or the score is of other tokens."
)


def write_headed(run: Run, into: Path, stored: str) -> tuple[Base, list[str]]:
    """Write a run with a head to the new folder `into`: as a sequence classifier if transformers
    has one that computes the run's logits, else as base and head. Return the run's base, and lines
    for the card that say how to use the model.

    run: a finished run with a head; stored: the format of the weights, such as "float32"

    Guarantee: the classifier was read back, and gave the run's logits on TEXTS.
    Errors: ConfigError (a base that reads more than text); ModelError; OSError."""
    loaded = load(run.folder, dtype=torch.float32)
    if loaded.base.kind not in ("encoder", "causal") or loaded.head is None:
        raise ConfigError(
            f"{run.folder}: its base reads images or recordings, for which "
            "transformers has no classifier",
            "a run of a text base",
            f"use it as it is: `fedtune predict {run.folder} --data FILE`",
        )
    labels = _labels(run, loaded)
    tokenizer = _tokenizer(loaded, run, bool(labels))
    passages = [np.array(loaded.tokenizer(text)["input_ids"]) for text in TEXTS]
    expected = torch.stack([loaded.scores(ids) for ids in passages])
    model = loaded.model.merge_and_unload() if loaded.adapted else loaded.model
    made = classifier_of(loaded, model, labels)
    if made is not None:
        made.config.pad_token_id = tokenizer.pad_token_id
        made.save_pretrained(str(into))
        made = _read_back(into, passages, expected)
    if made is None:
        shutil.rmtree(into, ignore_errors=True)
        model.save_pretrained(str(into))
        shutil.copyfile(run.folder / "adapter" / HEAD, into / HEAD)
        made = model
    if stored != "float32":
        made.to(getattr(torch, stored)).save_pretrained(str(into))
    tokenizer.save_pretrained(str(into))
    return loaded.base, _use(run, loaded, model, made, labels)


def _labels(run: Run, loaded: LoadedModel) -> tuple[str, ...]:
    """Return the names of the classes, in the order of the head's outputs; () for a head that gives
    a reward. Errors: ModelError if the head has another number of outputs than the plan."""
    assert loaded.head is not None
    labels = run.study.objective.labels
    if loaded.head.out_features != (len(labels) or 1):
        raise ModelError(
            f"{run.folder}: its head has {loaded.head.out_features} outputs",
            f"the plan's {len(labels) or 1}",
            AGAIN,
        )
    return labels


def _tokenizer(loaded: LoadedModel, run: Run, classes: bool) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer with two changes for the exported folder. Its maximal length is
    the study's. And if a reward head's tokenizer pads with eos, it gets another pad token, since
    answers end with eos. classes: whether the head has classes; if not, it is a reward head."""
    tokenizer = loaded.tokenizer
    tokenizer.model_max_length = run.study.objective.max_length
    if not classes and tokenizer.pad_token_id == tokenizer.eos_token_id:
        # the classifier takes the last token that is no padding, and an answer ends with eos
        for token in (tokenizer.unk_token, tokenizer.bos_token):
            if token is not None and token != tokenizer.eos_token:
                tokenizer.pad_token = token
                break
    return tokenizer


def _read_back(folder: Path, passages: list[np.ndarray], expected: torch.Tensor) -> Any:
    """Load the classifier that was written to `folder`, and check it. Return the classifier if its
    logits are close to the run's, else None. passages: token ids; expected: the run's logits on
    each, (passages, outputs)."""
    from transformers import AutoModelForSequenceClassification

    made: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    ).eval()
    with torch.no_grad():
        rows = [made(torch.from_numpy(ids)[None]).logits[0] for ids in passages]
    difference = (torch.stack(rows) - expected).abs().max()
    return made if difference <= CLOSE * (1 + expected.abs().max()) else None


def _use(
    run: Run, loaded: LoadedModel, model: Any, made: Any, labels: tuple[str, ...]
) -> list[str]:
    """Return the lines of the card's section on how to use the folder.

    - run: the run that was exported, for the template and eos of its prompts
    - loaded: the run's loaded model, for the kind of its base and its tokenizer
    - model: the base with the adapter merged into it, without a head
    - made: the sequence classifier that was written; `model` itself if transformers has none
    - labels: the classes; () for a reward head"""
    lines: list[str] = []
    if made is model:
        pool = MEAN if loaded.base.kind == "encoder" else LAST
        text = BY_HAND.format(labels=json.dumps(labels, ensure_ascii=False), pool=pool)
    else:
        text = PIPELINE.format(more=", top_k=None" if labels else "")
        if loaded.base.kind == "encoder":
            lines = [WIDENED, ""]
        elif made.config.num_hidden_layers > model.config.num_hidden_layers:
            lines = [ONE_MORE, ""]
    if not labels:
        template = " in objective.template" if run.study.objective.template else ""
        eos = loaded.tokenizer.eos_token if run.study.objective.append_eos else None
        words = REWARD.format(template=template, eos=eos)
        lines += [words if eos else words.replace(", and the token None", ""), ""]
    return [*lines, *text.splitlines()]
