"""Commands that make new models, preferences and comparisons from models and finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from fedtune.cli.columns import COLUMNS, SEEDS, public_prompts
from fedtune.cli.exit_codes import command
from fedtune.cli.feedback import improve, label
from fedtune.cli.study import SET, STUDY, load
from fedtune.derive.settings import DistillSettings


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the commands on `app`. panel: the heading under which --help lists them."""
    for function in (label, improve, distill, merge, export, choose_base):
        command(app, panel=panel)(function)


DISTILL_TEACHERS = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN…",
        help="Folders of finished runs, the teachers. From several teachers the student learns "
        "the mean of their distributions.",
    ),
]
DISTILL_PROMPTS = Annotated[
    Path,
    typer.Option(metavar="FILE", help="A file of public prompts, with or without completions."),
]
DISTILL_LICENCE = Annotated[
    str,
    typer.Option(metavar="NAME", help="Licence of the prompts, for the report, such as CC0-1.0."),
]
DISTILL_OUT = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="The run folder to create.", show_default=False)
]
DISTILL_LAYERS = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="N",
        help="Make the student from N layers of the first teacher, and drop the layers that "
        "matter least. Give either this or --student.",
        show_default=False,
    ),
]
DISTILL_STUDENT = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Use another base as the student: pypi:NAME, a folder, or a hub id. Give either "
        "this or --layers.",
        show_default=False,
    ),
]
DISTILL_EPOCHS = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Passes over the prompts; 0 leaves the student untrained."
    ),
]
DISTILL_RANK = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=8192,
        metavar="N",
        help="LoRA rank of the student's adapter.",
        show_default="the teacher's",
    ),
]
DISTILL_LAST_LAYERS = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Put adapters in the last N layers only; 0: in all layers.",
        show_default="the teacher's; with --student all",
    ),
]
DISTILL_LEARNING_RATE = Annotated[
    float, typer.Option(metavar="RATE", help="Peak learning rate of AdamW.")
]
DISTILL_TEMPERATURE = Annotated[
    float, typer.Option(metavar="T", help="Softmax temperature of teacher and student.")
]
DISTILL_NEW_TOKENS = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Maximum number of new tokens in a teacher's answer to a prompt without a completion.",
    ),
]
DISTILL_SEED = Annotated[
    int,
    typer.Option(
        min=0,
        max=SEEDS,
        help="Seed of the teacher's answers, the order of the prompts and the student's adapter.",
    ),
]


def distill(
    teachers: DISTILL_TEACHERS,
    prompts: DISTILL_PROMPTS,
    licence: DISTILL_LICENCE,
    out: DISTILL_OUT,
    layers: DISTILL_LAYERS = None,
    student: DISTILL_STUDENT = None,
    columns: COLUMNS = None,
    epochs: DISTILL_EPOCHS = DistillSettings.epochs,
    rank: DISTILL_RANK = None,
    last_layers: DISTILL_LAST_LAYERS = None,
    learning_rate: DISTILL_LEARNING_RATE = DistillSettings.learning_rate,
    temperature: DISTILL_TEMPERATURE = DistillSettings.temperature,
    new_tokens: DISTILL_NEW_TOKENS = DistillSettings.new_tokens,
    seed: DISTILL_SEED = DistillSettings.seed,
) -> dict[str, Any]:
    """Distil finished runs into a small student on public prompts, at the coordinator.

    The student learns the teachers' whole distribution (next tokens, or classes), not only their
    answers. With --layers the student starts as the first teacher without some of its layers, and
    the layer before the dropped ones is refitted to replace them. Distillation is post-processing:
    it costs no ε, and the report repeats what the runs spent. The result is a run folder: evaluate,
    generate and merge accept it, and plain transformers and PEFT load it."""
    from fedtune.cli.console import closing
    from fedtune.cli.watch import Watch
    from fedtune.derive.distill import distill as teach
    from fedtune.runs.run import Run

    file = public_prompts(prompts, licence, columns or [])
    settings = DistillSettings(
        rank=rank, last_layers=last_layers, epochs=epochs, learning_rate=learning_rate,
        temperature=temperature, new_tokens=new_tokens, seed=seed,
    )  # fmt: skip
    console = Console()
    with Watch(console, "loading teachers"):
        runs = [Run(folder) for folder in teachers]
        made = teach(runs, file, out, student=student, layers=layers, settings=settings)
    closing(console, out, made.report)
    return made.report


MERGE_RUNS = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN…", help="Folders of two or more finished runs, or of exported models."
    ),
]
MERGE_OUT = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="The run folder to create.", show_default=False)
]
MERGE_METHOD = Annotated[
    Literal["linear", "svd", "ties", "dare", "slerp", "regmean"],
    typer.Option(
        metavar="METHOD",
        help="linear: the exact weighted sum of the updates. svd: the same sum at a smaller "
        "rank. ties, dare: the sum of a part of each update. slerp: spherical interpolation "
        "between two updates. regmean: least squares on the public texts of each run.",
    ),
]
MERGE_WEIGHTS = Annotated[
    str | None,
    typer.Option(
        metavar="W,W,…", help="One weight for each run. Default: 1 each.", show_default=False
    ),
]
MERGE_DENSITY = Annotated[
    list[float] | None,
    typer.Option(
        "--density",
        metavar="SHARE",
        help="For ties and dare: the share of each update's entries to keep; may be repeated, "
        "once for each run in their order. Default: 0.5.",
        show_default=False,
    ),
]
MERGE_RANK = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=8192,
        metavar="N",
        help="For svd, ties and dare: rank of the merged adapter. Default: the largest rank "
        "of the runs (svd), or the sum of their ranks.",
    ),
]
MERGE_SEED = Annotated[
    int,
    typer.Option(
        min=0, max=SEEDS, metavar="N", help="For dare: seed that chooses which entries stay."
    ),
]
MERGE_DISJOINT = Annotated[
    bool,
    typer.Option(
        "--disjoint",
        help="State that no person's records are in two of the runs, so that their ε need "
        "not be added up. The report says that you stated it.",
    ),
]
MERGE_MEASURE = Annotated[
    bool,
    typer.Option(
        help="Measure the base, each run and the merged adapter on the [evaluation] file of "
        "each run, if it is on this machine."
    ),
]


def merge(
    runs: MERGE_RUNS,
    out: MERGE_OUT,
    method: MERGE_METHOD = "linear",
    weights: MERGE_WEIGHTS = None,
    density: MERGE_DENSITY = None,
    rank: MERGE_RANK = None,
    seed: MERGE_SEED = 0,
    disjoint: MERGE_DISJOINT = False,
    measure: MERGE_MEASURE = True,
) -> dict[str, Any]:
    """Merge the adapters of finished runs of one base into one, with a report of its own.

    This reads no record of a site and costs no ε. The report composes the ε of runs in which the
    same site took part, or may have taken part. Exported models, which are whole models, are merged
    by mergekit."""
    from rich.markdown import Markdown

    from fedtune.cli.console import closing
    from fedtune.core.run_folder import is_exported
    from fedtune.derive.merge import merge_runs
    from fedtune.derive.merge_exported import merge_models
    from fedtune.report.merged import section
    from fedtune.report.run_files import read_report
    from fedtune.runs.run import Run

    console, shares = Console(), numbers(weights)
    common: dict[str, Any] = {"method": method, "weights": shares, "seed": seed}
    common |= {"density": density} if density else {}
    with console.status("merging"):
        if any(map(is_exported, runs)):
            merge_models(runs, out, disjoint=disjoint, **common)
        else:
            parents = [Run(folder) for folder in runs]
            merge_runs(parents, out, rank=rank, disjoint=disjoint, measure=measure, **common)
    report = read_report(out)
    console.print(Markdown("\n\n".join(section(report["merge"], report["privacy"]))))
    closing(console, out, report)
    return report


def numbers(text: str | None) -> list[float]:
    """Parse numbers separated by commas, such as "0.5, 1". Errors: ConfigError."""
    from fedtune.core.errors import ConfigError

    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--weights {text}: not numbers", "such as 1,0.5") from None


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a finished run, or its dossier.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="PATH", help="The folder or .gguf file to create.")
    ],
    to: Annotated[
        Literal["hf", "gguf"],
        typer.Option(help="hf: a transformers folder. gguf: one file for llama.cpp and Ollama."),
    ] = "hf",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "q8_0"] | None,
        typer.Option(
            metavar="DTYPE",
            help="Number format of the weights: float32, float16, bfloat16 or q8_0 (gguf "
            "only). Default: float32 (hf), float16 (gguf).",
            show_default=False,
        ),
    ] = None,
) -> dict[str, Any]:
    """Merge base and adapter of a run into one model that other programs load.

    This costs no ε. The model's guarantee, its limits and the base's licence are copied with it. If
    RUN is a dossier, the dossier is copied into a transformers folder too."""
    from fedtune.derive.export import export as write
    from fedtune.evidence.coordinator_home import coordinator_log
    from fedtune.evidence.dossier.seal import RELEASE
    from fedtune.evidence.sign import RUN
    from fedtune.runs.run import Run

    with Console().status("merging base and adapter"):
        made = write(Run(run / RUN if (run / RELEASE).is_file() else run), out, to, dtype)
    if acts := coordinator_log(run):
        acts.add("export", f"--to {to}", run=run.absolute())
    typer.echo(f"wrote {made}")
    return {"wrote": made}


def choose_base(
    study: STUDY,
    target: Annotated[
        float,
        typer.Option(
            metavar="X", help="The value of the study's metric that the base should reach."
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="A base to measure; may be repeated. Default: the study's base and the causal "
            "ones of `models list`.",
        ),
    ] = None,
    quantised: Annotated[
        list[str] | None,
        typer.Option(
            "--quantised",
            metavar="METHOD",
            help="Also measure each base quantised by METHOD, nf4 or int8; may be repeated.",
        ),
    ] = None,
    sites: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Number of sites for which the metric at an ε is predicted."
        ),
    ] = 3,
    size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Declared size of each of these sites.")
    ] = 200,
    epsilons: Annotated[
        list[float] | None,
        typer.Option(
            "--epsilon",
            min=1e-9,
            metavar="E",
            help="Predict the metric at this ε too, beside the study's own; may be repeated.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the result to FILE as JSON."),
    ] = None,
    settings: SET = None,
) -> None:
    """Measure bases on this machine, and name the smallest one that meets a target.

    This reads the study's public text and evaluation records, and no record of a site. The metric
    at an ε is only predicted, from one pass over the public records. The prediction tells bases
    that cannot learn the task from those that can, and little more."""
    from fedtune.cli.console import fit_table
    from fedtune.cli.watch import Watch
    from fedtune.core.files.writing import check_replaceable, replace
    from fedtune.evaluation.compare_bases import choose_base as measure

    console, loaded = Console(), load(study, settings)
    if json_file:
        check_replaceable(json_file, ".json")
    with Watch(console, "measuring bases, one process each"):
        comparison = measure(
            loaded, target, models or (), sites=sites, size=size, epsilons=epsilons or (),
            quantised=quantised or (),
        )  # fmt: skip
    console.print(fit_table(comparison))
    text = f"the smallest that meets {comparison.metric} {comparison.target:g} ({comparison.by})"
    typer.echo(f"{text}: {comparison.chosen or 'none of them'}")
    if json_file:
        replace(json_file, (comparison.as_json() + "\n").encode())
        typer.echo(f"wrote {json_file}")
