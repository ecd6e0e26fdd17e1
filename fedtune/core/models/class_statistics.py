"""Sum a site's records by class: their vectors in a public basis, and their number.

The basis is public and fixed before a record is read. The usefulness of the sums depends on it, but
the guarantee does not: features are bounded here, and a unit's sums are clipped and noised like
every gradient."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedtune.core.errors import ModelError
from fedtune.core.registry.arrays import CLASS_BASIS, CLASS_MEAN

Arrays = dict[str, npt.NDArray[np.float32]]
LARGEST = 1e3  # largest entry of basis or mean, as in an adapter


class ClassStatistics(nn.Module):
    """The trained sums of class statistics: for each class, the sum of the features of its records'
    vectors, and their number. A vector x has the features f(x) = V (x - m), which are shortened to
    length 1 if they are longer.

    The tensors are basis, V (k, H), and mean, m (H,), both public; and sums (K, k + 1), for each
    class the sum of features and then the count. Only the sums are trained. All three are zero at
    first.

    - hidden: H, the length of the vectors that the base gives
    - directions: k, the number of the basis' directions, and so of features
    - classes: K, the number of classes
    - device: the device that holds all three tensors"""

    basis: torch.Tensor
    mean: torch.Tensor

    def __init__(self, hidden: int, directions: int, classes: int, device: torch.device) -> None:
        super().__init__()
        self.sums = nn.Linear(directions + 1, classes, bias=False, device=device)
        self.register_buffer("basis", torch.zeros(directions, hidden, device=device))
        self.register_buffer("mean", torch.zeros(hidden, device=device))
        self.reset()

    def reset(self) -> None:
        """Set the sums to zero. This is done at the start of every round."""
        nn.init.zeros_(self.sums.weight)

    def forward(self, vectors: torch.Tensor, count_weight: float) -> torch.Tensor:
        """Return the inner product of each vector's statistics with each class's sums, (B, K) fp32.
        A vector's statistics are its features, then `count_weight`; zeros if the vector or its
        features are not finite. Since entry (b, c) of the result is linear in the sums of class c,
        its gradient with respect to these sums is the statistics of vector b.

        - vectors: the base's vectors of B records, (B, H)
        - count_weight: what a record adds to its class's count

        Guarantee: a record's statistics have length at most √(1 + count_weight²), up to fp32
        rounding, whatever basis and vector are. They depend on its own vector alone, to the last
        bit."""
        products: torch.Tensor = self.sums(self.statistics(vectors, count_weight))
        return products

    @torch.no_grad()
    def statistics(self, vectors: torch.Tensor, count_weight: float) -> torch.Tensor:
        """Compute the statistics of B vectors (B, H). They are (B, k + 1) fp32: the k features of
        each vector and then `count_weight`, or zeros for a vector whose features are not finite."""
        centred = vectors.float() - self.mean
        # One product a row: no row's result depends on where it stands or who is beside it.
        basis = self.basis.expand(len(centred), -1, -1)
        features = torch.bmm(basis, centred[:, :, None])[:, :, 0]
        is_finite = torch.isfinite(features).all(dim=1, keepdim=True)
        features = torch.where(is_finite, features, 0.0)
        # In double precision: the square of a large feature overflows in fp32.
        length = torch.linalg.vector_norm(features.double(), dim=1, keepdim=True)
        features = (features / length.clamp_min(1.0)).float()
        return torch.cat([features, count_weight * is_finite.float()], dim=1)

    def load(self, arrays: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Load basis and mean from `arrays`, which holds both by name and nothing else. Errors:
        ModelError if `arrays` has other names, or an array has another shape than this network's,
        is not finite, or has an entry larger than LARGEST; nothing is loaded then."""
        held = {CLASS_BASIS: self.basis, CLASS_MEAN: self.mean}
        if arrays.keys() != held.keys():
            raise ModelError(
                "the plan brings no basis of class statistics", f"{CLASS_BASIS} and {CLASS_MEAN}"
            )
        for name, array in arrays.items():
            if array.shape != tuple(held[name].shape):
                raise ModelError(
                    f"{name} has another shape than this base and plan ask for",
                    f"{tuple(held[name].shape)}",
                    "ask the coordinator for a plan that fedtune made",
                )
            if not (np.isfinite(array).all() and np.abs(array).max(initial=0.0) <= LARGEST):
                raise ModelError(
                    f"{name} is out of range",
                    f"finite numbers of at most {LARGEST:g}",
                    "ask the coordinator for a plan that fedtune made",
                )
        for name, tensor in held.items():
            tensor.copy_(torch.from_numpy(np.array(arrays[name], dtype=np.float32)))

    def arrays(self) -> Arrays:
        """Return copies of basis and mean, in a dict by the names under which they are sent."""
        held = {CLASS_BASIS: self.basis, CLASS_MEAN: self.mean}
        return {name: tensor.cpu().numpy().copy() for name, tensor in held.items()}

    def draw(self, seed: int) -> None:
        """Set the basis to numbers drawn from a public seed, uniform in [-1/√H, 1/√H] for vectors
        of H numbers, and the mean to 0. This is for use before the plan's own basis is known."""
        generator = torch.Generator().manual_seed(seed)
        bound = self.basis.shape[1] ** -0.5
        drawn = torch.empty(self.basis.shape).uniform_(-bound, bound, generator=generator)
        self.basis.copy_(drawn)
        self.mean.zero_()
