"""Find out whether, on this machine, a row's last digits depend on its place in a matrix.

A library may compute the last rows of a matrix by other instructions than the first, or a tensor's
last numbers one by one. Then a record's result would depend on its place in a block, and so on
which other records are there. Which library does so, and for which shapes, depends on the
processor, on what a virtual machine shows of it, and on settings such as MKL_CBWR. So it is tried
here for the shapes of the network at hand, before a record is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional

from fedtune.core.models.cores import one_operator_thread
from fedtune.core.objectives._shapes import EIGHT

WIDEST = 2048  # a weight's longer side is tried at a length from half of this up to this
WHOLE = 64  # numbers; the length of a processor's vector, in any precision, divides this
Function = Callable[[torch.Tensor], torch.Tensor]
LOSSES: tuple[Function, ...] = (  # functions that losses apply to tensors of any few numbers
    torch.exp, torch.expm1, functional.logsigmoid, lambda numbers: torch.log(numbers.abs() + 1e-3),
)  # fmt: skip
FUNCTIONS: tuple[Function, ...] = (*LOSSES,
    torch.sigmoid, torch.tanh, functional.silu, functional.gelu, functional.softplus,
    partial(functional.gelu, approximate="tanh"), lambda numbers: torch.rsqrt(numbers.abs() + 1e-3),
)  # fmt: skip


def rows_keep_digits(modules: nn.Module, positions: int, device: torch.device) -> bool:
    """Return whether every row of a block has the same digits wherever it lies: in the products
    with each weight of `modules`, as a layer computes them forward and backward, and in functions
    of single numbers. Random numbers are tried, for every number of rows that a block of several
    records may have.

    - modules: the layers of a network, base and adapter
    - positions: the most positions of a block
    - device: where blocks are computed; on a processor by one operator thread"""
    shapes = dict.fromkeys(_weights(modules))
    with torch.inference_mode(), one_operator_thread():
        products = (
            _product_keeps_digits(positions, *shape, dtype, device) for shape, dtype in shapes
        )
        kinds = {dtype for _, dtype in shapes}
        return all(_functions_keep_digits(kind, device) for kind in kinds) and all(products)


def _weights(modules: nn.Module) -> Iterator[tuple[tuple[int, int], torch.dtype]]:
    """Yield the shape and the type of each weight of `modules` by which rows are multiplied. A
    quantised weight is multiplied in the type of the layer's other numbers. This may be fp32 or
    bf16, so both are yielded."""
    for weight in modules.parameters():
        if weight.dim() == 2 and weight.is_floating_point():
            yield (_side(weight.shape[0]), _side(weight.shape[1])), weight.dtype
    for module in modules.modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            shape = _side(module.out_features), _side(module.in_features)
            yield shape, torch.float32
            yield shape, torch.bfloat16


def _side(length: int) -> int:
    return length if length <= WIDEST else WIDEST // 2 + length % (WIDEST // 2)


@cache
def _product_keeps_digits(
    most: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Return whether the product of a matrix with a weight (outputs, inputs) has the same rows, to
    the last digit, if the rows of the matrix are put in another order. Two products are tried: that
    by which a layer computes its outputs, and that which gives the gradient at its inputs. Every
    multiple of EIGHT rows up to `most` is tried, since layers and head compute such a number of
    rows for a block of several records."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    weight = random(outputs, inputs)
    forward, backward = random(most, inputs), random(most, outputs)

    def keeps(rows: int) -> bool:
        order = torch.randperm(rows, generator=draw).to(device)
        there, back = forward[:rows], backward[:rows]
        return torch.equal(
            functional.linear(there[order], weight), functional.linear(there, weight)[order]
        ) and torch.equal(back[order] @ weight, (back @ weight)[order])

    return all(map(keeps, range(EIGHT, most + 1, EIGHT)))


@cache
def _functions_keep_digits(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the results and gradients of FUNCTIONS, which include LOSSES, keep their
    digits if the numbers are at other places in a tensor.

    - FUNCTIONS are tried on tensors whose length is a multiple of WHOLE
    - in fp32, in which losses are computed, FUNCTIONS are also tried on tensors with one number for
      each row of a block (`cache._fit_to_vectors`), and LOSSES on tensors of any few numbers"""
    draw = torch.Generator().manual_seed(0)
    whole = [WHOLE * n for n in (1, 2, 3, 5, 7, 11)]
    few = [2**n for n in range(3, 11)] if dtype == torch.float32 else []
    fewer = [*range(2, 16), 24, 40] if dtype == torch.float32 else []

    def keeps(function: Function, length: int) -> bool:
        values = (3 * torch.randn(length, generator=draw) + 2).to(device, dtype)
        above = torch.randn(length, generator=draw).to(device, dtype)
        found = []
        for given, slope in ((values, above), (values.flip(0), above.flip(0))):
            with torch.inference_mode(False), torch.enable_grad():
                given = given.clone().requires_grad_(True)
                results = function(given)
                torch.autograd.backward(results, slope.clone())
            assert given.grad is not None
            found.append(torch.stack([results.detach(), given.grad]))
        return torch.equal(found[0].flip(1), found[1])

    return all(keeps(function, length) for function in FUNCTIONS for length in whole + few) and all(
        keeps(function, length) for function in LOSSES for length in fewer
    )
