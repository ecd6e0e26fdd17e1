"""Fed-SB: train an r × r matrix R between two factors that stay fixed.

What: Singhal, Ponkshe, Vartak, Varshney and Vepakomma 2025, "Fed-SB: a silver bullet for extreme
communication efficiency and performance in (private) federated LoRA fine-tuning"
(arXiv:2502.15436): ΔW = s · B R A with B and A fixed and common, R (r, r) trained and
averaged. B and A are the singular vectors of a first update of all weights, computed on records
to train on (LoRA-SB, Ponkshe et al. 2024, arXiv:2411.19557). Here both come from public records,
so they cost no ε.

Carried by the plan alone: a narrow preconditioner of as many directions as the adapter has ranks.
It projects a gradient of B on the span of U (outputs, r) before the clip and applies the same
projection to the noised mean, so B moves as U R with R (r, r). With U's columns of one length what
is clipped is the gradient of R, and the noise that is left is that of R's r² numbers: noise along
all other directions moves nothing. A damping this large makes the columns of one length. U holds
the r strongest directions of public records' output gradients, A (`a_init = "public"`) those of
their activations. Two differences from the paper are left: R starts at zero (ΔW at zero) instead
of at the singular values, and a site sends U's part inside a tensor of B's shape, so nothing is
saved on the wire.

Guarantee: a unit's projected gradient is clipped once to C and noised; U and A are public and are
pinned in the plan before a record is read. Averaging R is exact and is post-processing.
"""

from __future__ import annotations

from examples.methods import Settings, rates
from examples.methods.ffa_lora import PLANS as FFA_LORA
from examples.write import Table, merged

EVEN = 1e4  # damping with which all directions that are kept count alike
PLANS: dict[str, Table] = {
    # The public records are the sections' descriptions, see `compare`.
    "mts_dialog": merged(
        FFA_LORA["mts_dialog"],
        {
            "lora": {
                "a_init": "public",
                "preconditioner": {"rank": 8, "damping": EVEN, "narrow": True},
            },
            "public": {
                "path": "public.jsonl",
                "licence": "CC BY 4.0",
                "columns": {"text": "dialogue", "label": "section"},
            },
        },
    ),
    "medquad": {
        "lora": {"preconditioner": {"rank": 16, "damping": EVEN, "narrow": True}},
        "start": None,
        "training": {"rounds": 3},
    },
}
TRIED: dict[str, Settings] = {
    "mts_dialog": rates({1.0: (0.1, 0.4, 1.6), 3.0: (0.2, 0.8, 3.2), 8.0: (0.4, 1.6, 6.4)}),
    "medquad": rates({1.0: (2.5, 10.0, 40.0), 3.0: (5.0, 20.0, 80.0), 8.0: (10.0, 40.0, 160.0)}),
}
