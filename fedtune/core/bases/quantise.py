"""Quantise a frozen base to 4 or 8 bits (QLoRA) with bitsandbytes, on a GPU or a processor.

A record's numbers must not depend on the other records of the micro-batch. bitsandbytes' int8
treats "outlier" columns apart, and one large value in any record makes a column an outlier for all.
Here the threshold is 0, so that each position is rounded by itself.

Reference: Dettmers et al. 2023, "QLoRA", sections 2 and 3; Dettmers et al. 2022, "LLM.int8()"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedtune.core.boot import show_quantisation
from fedtune.core.config import QuantisationTable
from fedtune.core.errors import ConfigError

OUTLIERS = 0.0  # LLM.int8()'s threshold; see above


def quantise(model: nn.Module, table: QuantisationTable, dtype: torch.dtype) -> None:
    """Replace the weights of `model`'s linear layers (except its head) by quantised ones that
    compute in `dtype`. Biases, norms and embeddings stay. table: the method and its settings.
    Errors: ConfigError without bitsandbytes."""
    bnb = _library(table)

    def quantise_layer(layer: nn.Linear) -> nn.Module:
        shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
        device, weight = layer.weight.device, layer.weight.detach()
        quantised: Any
        if table.method == "nf4":
            quantised = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=dtype, quant_type="nf4")
            quantised.weight = bnb.nn.Params4bit(
                weight.clone(),
                requires_grad=False,
                blocksize=table.block_size,
                compress_statistics=table.double,
                quant_type="nf4",
            )
            # Else the first pass without gradients repacks the weights for good, and the kernel
            # for them hands no gradient down.
            quantised.support_avx512bf16_for_cpu = False
        else:
            quantised = bnb.nn.Linear8bitLt(
                *shape, bias=bias, has_fp16_weights=False, threshold=OUTLIERS
            )
            quantised.weight = bnb.nn.Int8Params(
                weight.clone(), requires_grad=False, has_fp16_weights=False
            )
        if bias:
            quantised.bias = layer.bias
        quantised = quantised.to(device).requires_grad_(False).eval()
        with torch.no_grad():  # a layer takes its final form at its first call
            quantised(torch.zeros(1, 1, layer.in_features, dtype=dtype, device=device))
        return quantised  # type: ignore[no-any-return]

    _replace(model, quantise_layer)
    marked: Any = model  # PEFT reads it there
    marked.is_loaded_in_4bit = table.method == "nf4"
    marked.is_loaded_in_8bit = table.method == "int8"


def round_weights(model: nn.Module, table: QuantisationTable, dtype: torch.dtype) -> None:
    """Round the weights of `model`'s linear layers to the values that quantisation gives them. They
    are the values that `quantise` gives a base that is loaded in `dtype`, but are stored as plain
    numbers of `model`'s own type. An adapter that was trained on the quantised base belongs to
    these weights. Errors: ConfigError without bitsandbytes."""
    functional = _library(table).functional

    def dequantise(layer: nn.Linear) -> nn.Module:
        weight = layer.weight.detach().to(dtype)
        if table.method == "nf4":
            packed, state = functional.quantize_4bit(
                weight.contiguous(),
                blocksize=table.block_size,
                compress_statistics=table.double,
                quant_type="nf4",
            )
            values = functional.dequantize_4bit(packed, state)
        else:
            codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
            values = codes.float() * (scales[:, None] / 127.0)
        layer.weight = nn.Parameter(values.to(layer.weight.dtype), requires_grad=False)
        return layer

    _replace(model, dequantise)


def _replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    head = getattr(model, "lm_head", None)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, make(child))


def _library(table: QuantisationTable) -> Any:
    show_quantisation()
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError(
            f'base.quantisation.method = "{table.method}" needs bitsandbytes, which '
            "is not installed",
            todo="pip install 'fedtune[qlora]', here and at every site, or leave the table out",
        ) from None
    return bitsandbytes
