"""Compute per-record gradients of LoRA's small factors, as batched matrix products in the
backward pass.

A record's gradient of B is an (outputs, rank) matrix and that of A a (rank, inputs) one: far
smaller than the activations from which they are computed. So they are computed layer by layer
during the backward pass, without hooks, without autograd's own sum over records, and without a
second pass. With A frozen the layer keeps only the rank-r activation, never its input. Of B, only
the columns that a site trains are computed (fedtune/core/models/rank_slice.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedtune.core.errors import ModelError
from fedtune.core.models.rank_slice import ALL

GradientSink = Callable[[nn.Parameter, torch.Tensor], None]
# PEFT's adapters over a linear layer, of any storage: x -> base(x) + scaling · B A x
_LORA = ("Linear", "Linear4bit", "Linear8bitLt")


class OnePass:
    """Computes per-record gradients of LoRA over a linear base of any kind (bf16, 4-bit, Conv1D),
    and of trainable linear layers. LoRA with dropout or bias is treated as its two linear layers. A
    disabled or merged adapter is left to PEFT, and then gives no gradient. Non-reentrant activation
    checkpointing works.

    - trained: the module that holds every trainable layer
    - parameters: the trained parameters, in the order in which their gradients are returned
    - columns: the columns of each B whose gradients are computed
    - missing: the parameters that this engine cannot serve; if there are any, do not use it

    | case                             | the gradients                                             |
    | a layer used twice in one pass   | are added up                                              |
    | a layer not used                 | are None, never zeros                                     |
    | gradients that are not by record | the caller compares their first axis with the batch, and  |
    |                                  | refuses them                                              |
    References: Goodfellow 2015, "Efficient per-example gradient computations"; Bu et al. 2023,
    "Differentially private optimization on large model at small cost", section 3.2."""

    name = "one-pass"
    side_by_side = True

    def __init__(
        self,
        trained: nn.Module,
        parameters: Sequence[nn.Parameter],
        columns: slice = ALL,
    ) -> None:
        self._parameters, self._mine = parameters, _OfThread()
        self._forwards: list[tuple[nn.Module, Callable[..., torch.Tensor]]] = []
        served: set[int] = set()
        for module in trained.modules():
            forward = _forward_of(module, self._collect, columns)
            if forward is None:
                continue
            trainable = {id(p) for p in module.parameters() if p.requires_grad}
            if trainable - served:
                self._forwards.append((module, forward))
                served |= trainable
        self.missing = [p for p in parameters if id(p) not in served]

    @contextmanager
    def watching(self) -> Iterator[None]:
        for module, forward in self._forwards:
            module.forward = forward
        try:
            yield
        finally:
            for module, _ in self._forwards:
                del module.forward
            self._clear()

    def __call__(self, losses: torch.Tensor) -> list[torch.Tensor | None]:
        try:
            torch.autograd.backward(losses.sum())  # for tensors on a CPU it runs in this thread
            return [self._mine.gradients.pop(id(p), None) for p in self._parameters]
        finally:
            self._clear()

    def _collect(self, parameter: nn.Parameter, gradients: torch.Tensor) -> None:
        previous = self._mine.gradients.get(id(parameter))
        if previous is None:
            self._mine.gradients[id(parameter)] = gradients
        elif previous.shape == gradients.shape:
            previous += gradients
            gradients.zero_()
        else:
            raise ModelError(
                "a layer gave no per-record gradient: it ran twice, for different numbers of rows"
            )

    def _clear(self) -> None:
        for gradients in self._mine.gradients.values():
            gradients.zero_()
        self._mine.gradients.clear()


class _OfThread(threading.local):
    """Holds the gradients that a thread's backward pass has collected so far: the parameter's id ->
    its gradients."""

    def __init__(self) -> None:
        self.gradients: dict[int, torch.Tensor] = {}


def per_record(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute the outer products of left and right, summed over each record's positions. left: (B,
    L, m); right: (B, L, n). The result is (B, m, n)."""
    if left.shape[2] > right.shape[2]:  # the product is two to three times quicker this way round
        return per_record(right, left).transpose(1, 2)
    return torch.bmm(left.transpose(1, 2), right)


def _forward_of(
    module: nn.Module, sink: GradientSink, columns: slice
) -> Callable[..., torch.Tensor] | None:
    """Build a forward function for the module, in whose backward pass the per-record gradients go
    to `sink`; None if this engine does not support the module.

    - module: a module of the network
    - sink: called with a parameter and its gradients, the records first
    - columns: the columns of a B whose gradients are computed"""
    if isinstance(module, LoraLayer):
        original = type(module).forward
        if not _is_vanilla_lora(module):
            return None
        return partial(_forward_adapted, module, original, sink, columns)
    if type(module) is nn.Linear and module.weight.requires_grad:
        return partial(_linear, module, sink)
    return None


def _is_vanilla_lora(layer: Any) -> bool:
    """Return whether the layer has one plain LoRA adapter: linear A and B without bias, B
    trainable, the base layer frozen, no dropout and no variant of LoRA."""
    if type(layer).__name__ not in _LORA or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant:
        return False
    a, b = layer.lora_A[name], layer.lora_B[name]
    return (
        all(type(part) is nn.Linear and part.bias is None for part in (a, b))
        and b.weight.requires_grad
        and not any(p.requires_grad for p in layer.base_layer.parameters())
        and isinstance(layer.lora_dropout[name], nn.Identity)
    )


def _forward_adapted(
    layer: Any, original: Any, sink: GradientSink, columns: slice, x: torch.Tensor, **more: Any
) -> torch.Tensor:
    """Compute a LoRA layer's output, (B, …, outputs): by `_Lora`, or by PEFT where no per-record
    gradient is taken.

    - layer: PEFT's layer, which `_is_vanilla_lora` accepts
    - original: PEFT's forward function, used if the adapter is disabled or merged, if gradients are
      off, or if `more` is given
    - sink: called with a factor (A or B) and its gradients, the records first
    - columns: the columns of B whose gradients are computed
    - x: the layer's input, (B, …, inputs)
    - more: PEFT's further arguments of a call"""
    if layer.disable_adapters or layer.merged or not torch.is_grad_enabled() or more:
        output: torch.Tensor = original(layer, x, **more)
        return output
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    base = layer.base_layer
    fused = type(layer) is LoraLinear and type(base) is nn.Linear and not base._forward_hooks
    weight, bias = (base.weight, base.bias) if fused else (None, None)
    out = None if fused else base(x)
    scaling = layer.scaling[name]
    adapted: torch.Tensor = _apply(_Lora, x, out, weight, bias, a, b, scaling, sink, columns)
    return adapted


def _linear(layer: nn.Linear, sink: GradientSink, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return functional.linear(x, layer.weight, layer.bias)
    output: torch.Tensor = _apply(_Linear, x, layer.weight, layer.bias, sink)
    return output


def _apply(kind: Any, *inputs: Any) -> Any:
    return kind.apply(*inputs)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x (B, …, n) as (B, positions, n), fp32: all positions of a record are in one axis."""
    return x.reshape(len(x), -1, x.shape[-1]).float()


class _Lora(torch.autograd.Function):
    """Compute y + s·(x Aᵀ)Bᵀ, where y is `out` if it is given, else x Wᵀ + bias with W frozen. The
    backward pass hands the per-record gradients of B, and of A if A is trained, to `sink`.

    - x: the layer's input, (B, …, inputs)
    - out: the frozen layer's output for x, (B, …, outputs); None if `weight` is given
    - weight: W of the frozen linear layer; None if `out` is given
    - bias: the bias of that layer; None if the layer has none, or `out` is given
    - a, b: A (rank, inputs) and B (outputs, rank)
    - scaling: s
    - sink: called with a factor and its gradients, fp32: (B, outputs, number of `columns`) for B,
      (B, rank, inputs) for A
    - columns: the columns of B whose gradients are computed"""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, out: torch.Tensor | None, weight: torch.Tensor | None,
        bias: torch.Tensor | None, a: nn.Parameter, b: nn.Parameter, scaling: float,
        sink: GradientSink, columns: slice,
    ) -> torch.Tensor:  # fmt: skip
        low = functional.linear(x.to(a.dtype), a).mul_(scaling)
        result = functional.linear(x, weight, bias) if out is None else out.clone()  # type: ignore[arg-type]
        flat, thin = result.view(-1, result.shape[-1]), low.view(-1, low.shape[-1])
        if flat.dtype == thin.dtype:
            flat.addmm_(thin, b.T)
        else:  # one rounding, as in PEFT: the sum in fp32, then the base's type
            flat.add_(thin @ b.T)
        ctx.save_for_backward(low, x if a.requires_grad else None, weight)
        ctx.factors = (a, b)
        ctx.scaling = scaling
        ctx.sink = sink
        ctx.columns = columns
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, x, weight = ctx.saved_tensors
        a, b = ctx.factors
        exact = _rows(grad)
        ctx.sink(b, per_record(exact, _rows(low)[..., ctx.columns]))
        grad_input = None
        if a.requires_grad or ctx.needs_input_grad[0]:
            thin = (exact @ b).mul_(ctx.scaling)
            if a.requires_grad:
                ctx.sink(a, per_record(thin, _rows(x)))
            if ctx.needs_input_grad[0]:
                grad_input = _input_gradient(grad, thin, a, weight)
        grad_out = grad if ctx.needs_input_grad[1] else None
        return grad_input, grad_out, None, None, None, None, None, None, None


def _input_gradient(
    grad: torch.Tensor, thin: torch.Tensor, a: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """Return the gradient at the layer's input, (records, …, inputs): through A and, where `weight`
    is given, through W as well.

    - grad: the gradient at the layer's output, (records, …, outputs)
    - thin: the gradient at A's output, fp32 (records, positions, rank): `grad` times the matrix B,
      scaled
    - a: A, (rank, inputs)
    - weight: W, (outputs, inputs); None if the frozen layer computes its part of the gradient"""
    shape = (*grad.shape[:-1], a.shape[1])
    flat = thin.view(-1, thin.shape[-1])
    if weight is None:
        return (flat @ a).to(grad.dtype).view(shape)
    grad_input = (grad @ weight).view(-1, a.shape[1])
    if grad_input.dtype == flat.dtype:
        return grad_input.addmm_(flat, a).view(shape)
    return grad_input.add_(flat @ a).view(shape)


class _Linear(torch.autograd.Function):
    """Compute x Wᵀ + bias. W is trained, and so is the bias unless it is frozen. The backward pass
    hands each record's gradient of W and of the bias to `sink`.

    - x: the layer's input, (B, …, inputs)
    - weight: W, (outputs, inputs)
    - bias: (outputs,), or None; if it is frozen, no gradient of it is computed
    - sink: called with a parameter and its gradients, fp32 (B, *shape)"""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        sink: GradientSink,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.trained, ctx.sink = (weight, bias), sink
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), (weight, bias) = ctx.saved_tensors, ctx.trained
        exact = _rows(grad)
        ctx.sink(weight, per_record(exact, _rows(x)))
        if bias is not None and bias.requires_grad:
            ctx.sink(bias, exact.sum(dim=1))
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None
