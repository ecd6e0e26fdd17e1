"""pfl's central mechanism: noise for a cohort that is simulated, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pfl.internal.ops import numpy_ops
from pfl.internal.ops.selector import set_framework_module
from pfl.privacy import GaussianMechanism, PLDPrivacyAccountant
from pfl.stats import MappedVectorStatistics

DELTA, C = 1e-6, 1.0


def differences() -> Iterator[str]:
    """Yield what pfl's code does, a line each."""
    set_framework_module(numpy_ops)
    planned = {"num_compositions": 10, "sampling_probability": 1.0, "mechanism": "gaussian"}
    whole, scaled = (
        PLDPrivacyAccountant(**planned, noise_parameter=5.0, delta=DELTA, noise_scale=scale)
        for scale in (1.0, 0.1)
    )
    for scale, plan in ((1.0, whole), (0.1, scaled)):
        noise = plan.cohort_noise_parameter
        yield f"noise_scale={scale}: ε = {plan.epsilon:.2f}, noise of {noise:.2f} C"
    mechanism = GaussianMechanism.from_privacy_accountant(whole, C)
    for _ in range(20):
        mechanism.add_noise(_statistics(), cohort_size=10)
    stated = mechanism.privacy_accountant.epsilon
    yield f"20 rounds of a plan of 10: ε = {stated:.2f}"
    first, second = (mechanism.add_noise(_statistics(), 10, seed=1)[0]["w"] for _ in range(2))
    yield f"after the same seed the noise is the same: {np.array_equal(first, second)}"


def _statistics() -> MappedVectorStatistics:
    return MappedVectorStatistics({"w": np.zeros(100)}, weight=1.0)


if __name__ == "__main__":
    print(*differences(), sep="\n")
