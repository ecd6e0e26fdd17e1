"""Scale B's gradient by the inverse square root of the output's curvature, estimated on public
text.

Gradients of B are large along a few directions of a layer's output and small along most, but noise
is equally large along all. M = b I - W Wᵀ is public before a record is read. A site clips M g in
place of the gradient g and adds its noise to it, and the adapter moves by M times the noised mean.
So steps are longer where gradients of public text are small, at no more noise. Clipping and noise
act on M g alone, so the guarantee does not depend on M. The adapter stays plain LoRA, since M is
applied to the change of B.

Only W (outputs, rank) is sent, so M is symmetric by its form. b follows from W: the mean square of
M's eigenvalues is 1, so that a step is as long as without M.

If noise is large, private records can teach little beyond W's directions, in which the gradients of
units agree most. For this there is a narrow preconditioner M = U Uᵀ. It has the same eigenvectors,
the same proportions among W's directions, and zero elsewhere. A unit's gradient is then clipped by
its part in these directions, and noise in other directions moves nothing. U is sent in place of W,
under another name.

References: Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
curvature", section 3 (the output factor); Li et al. 2022, "Private adaptive optimization with side
information" (preconditioning by public data before clipping)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.core.errors import ModelError

Arrays = dict[str, npt.NDArray[np.float32]]
LEAST = 1e-2  # no eigenvalue of M is smaller; by its form and scale none is larger than √(d/(d-k))
SCALE = 0.01  # most by which the mean square of a narrow M's eigenvalues differs from 1
_IN_B = ".lora_B."
_IN_M = ".lora_M."
_IN_NARROW = ".lora_U."


def name_for(name: str, *, narrow: bool = False) -> str:
    """Return the name of the preconditioner's factor for the B called `name`: that of W (M = b I -
    W Wᵀ) or, if `narrow`, that of U (M = U Uᵀ)."""
    return name.replace(_IN_B, _IN_NARROW if narrow else _IN_M)


def is_factor(name: str) -> bool:
    """Return whether an array of this name is a factor of a preconditioner's matrix M: W or U."""
    return _IN_M in name or _IN_NARROW in name


def separate_frozen(frozen: Mapping[str, npt.NDArray[np.float32]]) -> tuple[Arrays, Arrays]:
    """Separate a plan's frozen arrays. Return a pair of dicts by name: LoRA's A, and the
    preconditioner's factors (W or U)."""
    factors = {name: array for name, array in frozen.items() if is_factor(name)}
    return {n: a for n, a in frozen.items() if n not in factors}, factors


@dataclass(frozen=True, repr=False)
class Multiplier:
    """The matrix M by which the change of one B is multiplied: M = identity · I + sign · wide
    wideᵀ.

    - identity: the number b of M = b I - W Wᵀ; 0 for a narrow preconditioner, M = U Uᵀ
    - sign: -1; for a narrow preconditioner 1
    - wide: W, or U for a narrow preconditioner: (outputs, rank)"""

    identity: float
    sign: int
    wide: npt.NDArray[np.float32]


def multiplier_of(name: str, factors: Mapping[str, npt.NDArray[np.float32]]) -> Multiplier | None:
    """Return the preconditioner's matrix M for the trained tensor `name`; None if the tensor is no
    B, or `factors` has no factor for it. factors: W or U by name.

    Errors: ModelError if the factor is out of range."""
    if _IN_B not in name:
        return None
    if (narrow := factors.get(name_for(name, narrow=True))) is not None:
        check_narrow(narrow)
        return Multiplier(0.0, 1, narrow)
    factor = factors.get(name_for(name))
    return None if factor is None else Multiplier(identity_part(factor), -1, factor)


def identity_part(factor: npt.NDArray[np.float32]) -> float:
    """Compute the b with which the mean square of the eigenvalues of M = b I - W Wᵀ is 1. factor:
    W, (outputs, rank), which comes from the coordinator and is not trusted.

    Errors: ModelError if there is no such b, if an eigenvalue of this M is below LEAST, or if W
    does not have fewer columns than rows."""
    outputs, rank = factor.shape
    values = np.linalg.eigvalsh(factor.T.astype(np.float64) @ factor.astype(np.float64))
    total, squares = float(values.sum()), float((values**2).sum())
    root = total**2 - outputs * (squares - outputs)
    b = (total + math.sqrt(root)) / outputs if root >= 0 else math.nan
    if not (rank < outputs and b - float(values.max(initial=0.0)) >= LEAST):  # NaN too
        raise ModelError(
            "the plan's preconditioner is out of range",
            f"eigenvalues of at least {LEAST:g} and a mean square of 1",
            "ask the coordinator for a plan that fedtune made",
        )
    return b


def check_narrow(factor: npt.NDArray[np.float32]) -> None:
    """Check that the mean square of the eigenvalues of M = U Uᵀ is 1, so that none is above
    √outputs. factor: U, (outputs, rank), which comes from the coordinator and is not trusted.

    Errors: ModelError if it is not 1, to within SCALE, or U does not have fewer columns than
    rows."""
    outputs, rank = factor.shape
    wide = factor.astype(np.float64)
    squares = float(((wide.T @ wide) ** 2).sum())
    if not (rank < outputs and abs(squares / outputs - 1) <= SCALE):  # NaN too
        raise ModelError(
            "the plan's preconditioner is out of range",
            "eigenvalues with a mean square of 1",
            "ask the coordinator for a plan that fedtune made",
        )


def narrow_factors(factors: Arrays) -> Arrays:
    """Turn preconditioners into narrow ones. Return, by name, the factor U of the narrow matrix M =
    U Uᵀ for each W in `factors`. In W's directions this M equals b I - W Wᵀ, scaled so that the
    mean square of its eigenvalues is 1; in all other directions it is zero."""
    return {name.replace(_IN_M, _IN_NARROW): _narrow_factor(w) for name, w in factors.items()}


def _narrow_factor(factor: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    vectors, singular, _ = np.linalg.svd(factor.astype(np.float64), full_matrices=False)
    values = identity_part(factor) - singular**2  # eigenvalues of M in W's directions
    values[singular <= 1e-6 * singular.max(initial=1e-30)] = 0.0  # a direction that W does not have
    values *= math.sqrt(len(factor) / float((values**2).sum()))
    narrow: npt.NDArray[np.float32] = (vectors * np.sqrt(values)).astype(np.float32)
    return narrow


def rank_of(outputs: int, rank: int) -> int:
    """Return the number of columns of a preconditioner's factor W: `rank`, or `outputs` - 1 if
    that is smaller. outputs: the number of the layer's outputs."""
    return min(rank, outputs - 1)


def step_adapter(apply: Callable[[Arrays], Arrays], adapter: Arrays, frozen: Arrays) -> Arrays:
    """Return the adapter after one round, with the preconditioner applied if there is one.

    - apply: takes an adapter, and returns the next one without a preconditioner
    - adapter: the adapter before the round, by name
    - frozen: the plan's frozen arrays. If they hold a preconditioner, the change that `apply` makes
      to each B is multiplied by B's matrix M and added in fp64; if not, the result is
      apply(adapter)"""
    _, factors = separate_frozen(frozen)
    if not factors:
        return apply(adapter)
    return move_adapter(adapter, apply({n: np.zeros_like(a) for n, a in adapter.items()}), factors)


def move_adapter(adapter: Arrays, step: Mapping[str, npt.NDArray[Any]], factors: Arrays) -> Arrays:
    """Return an adapter's arrays moved by one step, by name, summed in fp64 and rounded to fp32.

    - adapter: the arrays before the step, by name
    - step: what is added to each array, by name
    - factors: the preconditioner's factors W or U, by name. The step of a B with a factor is
      multiplied by its matrix M first; any other tensor is moved by the step itself"""
    return {
        name: (array + multiply_by_m(step[name].astype(np.float64), name, factors)).astype(
            np.float32
        )
        for name, array in adapter.items()
    }


def multiply_by_m(
    values: npt.NDArray[np.float64], name: str, factors: Arrays
) -> npt.NDArray[np.float64]:
    """Multiply the values (…, outputs, columns) of the trained tensor `name` by its
    preconditioner's matrix M. Return `values` unchanged if `factors` (W or U by name) has none for
    it."""
    found = multiplier_of(name, factors)
    if found is None:
        return values
    wide = found.wide.astype(np.float64)
    return found.identity * values + found.sign * (wide @ (wide.T @ values))


def factor_of(
    moment: npt.NDArray[np.float64], rank: int, damping: float
) -> npt.NDArray[np.float32]:
    """Compute the preconditioner's factor W, fp32 (outputs, rank), from the sum G of public
    gradients' products. M = b I - W Wᵀ is made to be close to the matrix P = (G/ḡ + damping ·
    I)^(-1/2), where ḡ is the mean eigenvalue of G. M is scaled so that the mean square of its
    eigenvalues is 1.

    - moment: G (outputs, outputs), the sum of g gᵀ over public gradients
    - rank: the number of W's columns, at most outputs - 1
    - damping: a number > 0, which is added to each eigenvalue of G divided by their mean

    In the directions of the `rank` largest eigenvalues of G, M has P's eigenvalues. In all other
    directions it has their root mean square. Errors: ModelError if G is zero or not finite."""
    values, vectors = np.linalg.eigh(_require_finite(moment))  # ascending
    return _factor(values, vectors, rank, damping)


def factor_of_columns(
    columns: npt.NDArray[np.float64], rank: int, damping: float
) -> npt.NDArray[np.float32]:
    """Compute the preconditioner's factor W, fp32 (outputs, rank), as `factor_of` does, but from
    the public gradients themselves. For a wide layer the sum G of their products would take too
    much memory.

    - columns: the public gradients, (outputs, n) with n < outputs; G = columns columnsᵀ
    - rank: the number of W's columns, at most outputs - 1
    - damping: a number > 0, which is added to each eigenvalue of G divided by their mean

    Errors: ModelError if the columns are all zero, or not finite."""
    vectors, singular, _ = np.linalg.svd(_require_finite(columns), full_matrices=False)
    return _factor(singular[::-1] ** 2, vectors[:, ::-1], rank, damping)


def _require_finite(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if np.isfinite(array).all() and array.any():
        return array
    raise ModelError(
        "the gradients of public text are all zero, or not finite",
        "text with answers that the base does not know already",
        "choose another file as public.path",
    )


def _factor(
    values: npt.NDArray[np.float64], vectors: npt.NDArray[np.float64], rank: int, damping: float
) -> npt.NDArray[np.float32]:
    """Compute the preconditioner's factor W, fp32 (outputs, rank), from eigenvalues and
    eigenvectors of G, the sum of g gᵀ over public gradients. Eigenvalues of G that are not given
    are zero.

    - values: the n largest eigenvalues of G, ascending, (n,)
    - vectors: their eigenvectors as columns in the same order, (outputs, n)
    - rank: the number of W's columns, lowered to outputs - 1 if it is larger
    - damping: a number > 0, which is added to each eigenvalue of G divided by their mean"""
    outputs, known = vectors.shape
    mean = float(values.sum()) / outputs
    shrunk = 1 / np.sqrt(
        np.concatenate([np.zeros(outputs - known), values.clip(0) / mean]) + damping
    )
    shrunk /= math.sqrt(float((shrunk**2).mean()))
    rank = rank_of(outputs, rank)
    rest = math.sqrt(float((shrunk[:-rank] ** 2).mean()))
    lowered = np.sqrt((rest - shrunk[-rank:]).clip(0))
    factor = np.zeros((outputs, rank), np.float32)
    most = min(rank, known)
    factor[:, -most:] = vectors[:, -most:] * lowered[-most:]
    return factor
