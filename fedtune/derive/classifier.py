"""Build a transformers sequence classifier from a run with a head, without custom model code.

transformers' classifiers pool and classify in another way than fedtune's head, so layers are added
whose weights compute the head's input. H is the width of a state. Every construction is exact
except for rounding, and is compared with the run's logits before it is kept.

* An encoder's head reads √H · m / |m|, where m is the mean over tokens.
  BertForSequenceClassification reads the first token through a tanh instead. So each state h is
  stored twice, as [h, h], which changes no layer norm. One more layer attends to all tokens equally
  and writes [m, -m]. Since this has a mean of zero, its layer norm is [m, -m] · √H / |m|. It is
  made so small that tanh leaves it as it is.
* A causal base's head reads the last token, as LlamaForSequenceClassification does; but the head
  has a bias, and transformers' class has none. So one more layer, whose MLP has biases, writes the
  logits, and in addition a constant so large that it alone determines what the last norm divides
  by."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fedtune.core.models.loaded import LoadedModel

State = dict[str, torch.Tensor]
# Powers of two, so that scaling by them does not round:
# LOUD      so large that the residual, added to numbers of this size, vanishes in fp32
# SMALL     so small that tanh is the identity
# CONSTANT  so large that the squares of logits, added to its square, vanish in fp32
# GATE      so large that SiLU and GELU are the identity
LOUD = 2.0**38
SMALL = 2.0**-20
CONSTANT = 2.0**20
GATE = 32.0
# model_type: the encoder's name in the classifier, and the two layers of the classifier's head.
ENCODERS = {
    "bert": ("bert", "bert.pooler.dense", "classifier"),
    "roberta": ("roberta", "classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("roberta", "classifier.dense", "classifier.out_proj"),
}


def classifier_of(loaded: LoadedModel, model: Any, labels: tuple[str, ...]) -> Any:
    """Build the sequence classifier of transformers, fp32, that computes a run's logits. Return
    None if transformers has no class for it.

    - loaded: the run, for its head and the kind of its base
    - model: the run's base with the adapter merged in
    - labels: the classes; () for a reward head"""
    assert loaded.head is not None
    config, head = copy.deepcopy(model.config), loaded.head
    config.id2label = dict(enumerate(labels or ("score",)))
    config.label2id = {label: n for n, label in config.id2label.items()}
    config.problem_type = "single_label_classification" if labels else "regression"
    config.architectures, config.dtype = None, "float32"
    if loaded.base.kind == "encoder":
        if config.model_type not in ENCODERS or config.is_decoder:
            return None
        state = _widen_encoder(model, head)
        config.hidden_size, config.num_attention_heads = (
            2 * config.hidden_size,
            2 * config.num_attention_heads,
        )
        config.num_hidden_layers += 1
    elif not head.bias.any():
        state = _prefix_state(model.model, "model.") | {"score.weight": head.weight}
    elif config.model_type == "llama" and _fits(config, head):
        state = _with_bias(model, head)
        config.num_hidden_layers, config.mlp_bias = config.num_hidden_layers + 1, True
    else:
        return None
    return _build_model(config, state)


def _build_model(config: Any, state: State) -> Any:
    import transformers

    auto: Any = transformers.AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=False)
    own = {name: value.detach().clone() for name, value in state.items()}  # no storage is shared
    model.load_state_dict(own, assign=True)
    return model.eval()


def _prefix_state(module: nn.Module, prefix: str) -> State:
    return {prefix + name: value for name, value in module.state_dict().items()}


# ---------------------------------------------------------------------------------- an encoder


def _widen_encoder(model: Any, head: nn.Linear) -> State:
    """Build the weights of the classifier of an encoder, by name: the encoder with doubled states,
    the added layer that pools, and the head."""
    prefix, dense, last = ENCODERS[model.config.model_type]
    state: State = {}
    for name, value in model.state_dict().items():
        if not name.startswith("pooler."):
            state[f"{prefix}.{name}"] = _twice(name, value)
    size = model.config.hidden_size
    pooling = _pooling(size, model.config.intermediate_size, model.config.layer_norm_eps)
    at = f"{prefix}.encoder.layer.{model.config.num_hidden_layers}"
    state |= {f"{at}.{name}": value for name, value in pooling.items()}
    state |= {
        f"{dense}.weight": torch.eye(2 * size) * SMALL,
        f"{dense}.bias": torch.zeros(2 * size),
    }
    unused = torch.zeros(head.out_features, size)
    state[f"{last}.weight"] = torch.cat([head.weight / SMALL, unused], dim=1)
    state[f"{last}.bias"] = head.bias
    return state


def _twice(name: str, value: torch.Tensor) -> torch.Tensor:
    """Widen one weight of an encoder for a network in which each state is stored twice, its second
    half equal to the first. A weight that writes a state is repeated. A weight that reads a state
    gets zeros for the second half. The attention heads of the second half have queries, keys and
    values of zero. name: the weight's name in the base."""
    if "embeddings." in name and value.ndim == 2:
        return torch.cat([value, value], dim=1)
    if name.endswith("intermediate.dense.bias"):
        return value
    if name.endswith("intermediate.dense.weight"):
        return torch.cat([value, torch.zeros_like(value)], dim=1)
    if "attention.self." in name:  # queries, keys and values
        if value.ndim == 1:
            return torch.cat([value, torch.zeros_like(value)])
        return nn.functional.pad(value, (0, value.shape[1], 0, value.shape[0]))
    if value.ndim == 1:  # biases and layer norms of what writes a state
        return torch.cat([value, value])
    if name.endswith("attention.output.dense.weight"):
        value = torch.cat([value, torch.zeros_like(value)], dim=1)
    return torch.cat([value, value])


def _pooling(size: int, inner: int, eps: float) -> State:
    """Build the layer that writes [m, -m] · √H / |m| at every token, where m is the mean over
    all tokens. size: H; inner, eps: the base's intermediate_size and layer_norm_eps."""
    zero = torch.zeros(2 * size, 2 * size)
    none = torch.zeros(2 * size)
    both = torch.ones(2 * size)
    one, mirrored = torch.eye(size), torch.eye(size) * LOUD
    state = {
        f"attention.self.{name}.{kind}": zero if kind == "weight" else none
        for name in ("query", "key")
        for kind in ("weight", "bias")
    }
    mirror = torch.cat([mirrored, -mirrored])
    return state | {
        "attention.self.value.weight": nn.functional.pad(one, (0, size, 0, size)),
        "attention.self.value.bias": none,
        "attention.output.dense.weight": nn.functional.pad(mirror, (0, size)),
        "attention.output.dense.bias": none,
        "attention.output.LayerNorm.weight": both,
        "attention.output.LayerNorm.bias": none,
        "intermediate.dense.weight": torch.zeros(inner, 2 * size),
        "intermediate.dense.bias": torch.zeros(inner),
        "output.dense.weight": torch.zeros(2 * size, inner),
        "output.dense.bias": none,
        "output.LayerNorm.weight": both * (1 + eps) ** 0.5,  # it divides by √(1 + eps)
        "output.LayerNorm.bias": none,
    }


# ------------------------------------------------------------------------------- a causal base


def _fits(config: Any, head: nn.Linear) -> bool:
    """Return whether a layer of the base is wide enough to hold the head's logits and one constant
    beside them."""
    room: int = min(config.hidden_size, config.intermediate_size)
    return head.out_features < room


def _with_bias(model: Any, head: nn.Linear) -> State:
    """Build the weights, by name, of the sequence classifier for a Llama base. The classifier has
    one layer more than the base. This layer computes the head's logits, and the classifier's score
    matrix only reads them off."""
    config, outputs = model.config, head.out_features
    size, inner = config.hidden_size, config.intermediate_size
    state = _prefix_state(model.model, "model.")
    for at in range(config.num_hidden_layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            width = size if name == "down_proj" else inner
            state.setdefault(f"model.layers.{at}.mlp.{name}.bias", torch.zeros(width))
    first, last = "model.layers.0.", f"model.layers.{config.num_hidden_layers}."
    layer = {
        last + name.removeprefix(first): torch.zeros_like(value)
        for name, value in state.items()
        if name.startswith(first)
    }
    up, up_bias = torch.zeros(inner, size), torch.zeros(inner)
    up[:outputs] = head.weight
    up_bias[:outputs] = head.bias
    up_bias[outputs] = CONSTANT
    read = torch.arange(outputs + 1)
    layer[last + "mlp.down_proj.weight"][read, read] = LOUD / GATE
    layer[last + "mlp.gate_proj.bias"] += GATE
    layer |= {last + "mlp.up_proj.weight": up, last + "mlp.up_proj.bias": up_bias}
    layer[last + "input_layernorm.weight"] += 1
    layer[last + "post_attention_layernorm.weight"] = state["model.norm.weight"]
    score = torch.zeros(outputs, size)
    score[read[:-1], read[:-1]] = CONSTANT / size**0.5
    ones = torch.ones_like(state["model.norm.weight"])
    return state | layer | {"model.norm.weight": ones, "score.weight": score}
