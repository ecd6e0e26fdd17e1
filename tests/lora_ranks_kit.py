"""What test_lora_ranks.py and test_lora_ranks_plans.py share."""

from __future__ import annotations

import json
from pathlib import Path

RANKS = {"north": 8, "south": 4, "west": 2}
LORA = {"rank": 8, "alpha": 12.0, "modules": ["q_proj", "down_proj"], "min_rank": 2}
STUDY = """
privacy = "off"
[study]
name = "ranks"
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 8
min_rank = 2
alpha = 12
modules = ["q_proj", "down_proj"]
last_layers = 2
[objective]
name = "causal_lm"
max_length = 64
[training]
rounds = 2
local_steps = 2
sampling_rate = 1.0
optimizer = "adamw"
weight_decay = 0.1
learning_rate = 0.05
[clipping]
max_grad_norm = 0.5
unit = "patient"
[strategy]
weights = "declared"
min_sites = 3
round_timeout = 120
[wire]
update = "float32"
adapter = "float32"
"""


SITE = """
[site]
name = "{name}"
declared_size = {size}
state = "state-{name}"
{rank}
[data]
path = "{name}.jsonl"
columns = {{ prompt = "q", completion = "a", patient = "who" }}
[policy]
bases = "any"
allow_privacy_off = true
"""


def lay_out(folder: Path, base: Path, ranks: dict[str, int] = RANKS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for at, (name, rank) in enumerate(ranks.items()):
        rows = [
            {"who": str(n // 2), "q": f"{name}: fever on day {7 * n + at}", "a": "yn"[n % 2]}
            for n in range(16)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        line = f"lora_rank = {rank}" if rank < 8 else ""
        text = SITE.format(name=name, size=20 + 10 * at, rank=line)
        (folder / f"site-{name}.toml").write_text(text)
    (folder / "study.toml").write_text(STUDY.format(base=base))
    return folder / "study.toml"
