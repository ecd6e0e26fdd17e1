"""FFA-LoRA: train LoRA's B alone, beside an A that is frozen at its random start.

What: Sun, Li, Li and Ding 2024, "Improving LoRA in privacy-preserving federated learning" (ICLR,
arXiv:2403.12313). ΔW = s · B A with A drawn once from a public seed, equal everywhere,
and never trained; B starts at zero.

Carried by the plan alone: `lora.train = "B"` and `lora.a_init = "seed"`, which are fedtune's
defaults. fedtune's own plan for MedQuAD differs in what it makes of public text before the first
round: A, a preconditioner and five steps.

Guarantee: a unit's gradient of all B (and of a head, if there is one) is clipped once to C and
summed with the noise; averaging is post-processing of that sum. A follows from the seed, so it
costs no ε. The mean of the sites' B·A is the mean B times A: nothing is lost by averaging, and no
product of two noises arises.
"""

from __future__ import annotations

from examples.methods import Settings, rates
from examples.write import Table

# What the method changes in fedtune's own plan of each set.
PLANS: dict[str, Table] = {
    "mts_dialog": {
        "lora": {
            "rank": 8,
            "alpha": 16.0,
            "modules": ["query", "value"],
            "last_layers": 2,
            "train": "B",
            "a_init": "seed",
        },
        "objective": {"max_length": 128},
        "training": {"rounds": 5},
    },
    "medquad": {
        "lora": {"train": "B", "a_init": "seed", "preconditioner": None},
        "start": None,
        "training": {"rounds": 3},
    },
}

TRIED: dict[str, Settings] = {
    "mts_dialog": rates({1.0: (0.2, 0.8, 3.2), 3.0: (0.4, 1.6, 6.4), 8.0: (0.8, 3.2, 12.8)}),
    "medquad": rates({1.0: (2.5, 10.0, 40.0), 3.0: (5.0, 20.0, 80.0), 8.0: (10.0, 40.0, 160.0)}),
}
