"""What must be right for ε: the modules of fedtune/core, with what each is for.

    python -m tests.docs.boundary     # writes docs/what-must-be-right.md

A contract in pyproject.toml keeps fedtune.core from importing anything of fedtune outside it. What
a vault can load is followed here through the graph of imports, so that nothing else lives there:
imports inside functions count, those for types alone do not. A plug-in of this release is imported
by its name, so each is named as a beginning, and so is each package that holds a module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grimp

from fedtune.core.data.sources import SOURCES
from fedtune.core.modalities import MODALITIES
from fedtune.core.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "what-must-be-right.md"
CORE = "fedtune.core"
# The vault itself, and the programs that fork a child for one unit's rows or files.
PROGRAMS = (
    "fedtune.core.vault.process",
    "fedtune.core.data.conversion_process",
    "fedtune.core.data.media_process",
    "fedtune.core.data.scan_process",
)
BY_NAME = (OBJECTIVES, MODALITIES, SOURCES)  # what a plan or a site file names a class of
SMALL = 2  # lines of a package's __init__ that holds a docstring alone

# Part, what it does, and what belongs to it; where two fit, the longer one does.
PARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "The vault",
        "The process and the order of things: plan, policy, records, charge, noised steps, seal.",
        ("vault",),
    ),
    (
        "The gate",
        "What a plan may ask for, and what it costs: the policy, the accountants, the filter.",
        (
            *("vault.policy", "vault.declared", "vault.waiting_plans", "vault.studies"),
            *("config.sheet", "dp.accountant", "dp.calibration", "dp.filter", "strategy"),
        ),
    ),
    (
        "The ledger",
        "What was spent, by whom, signed and chained; the log of what the site's process did.",
        ("ledger", "vault.noted"),
    ),
    (
        "The units",
        "Rows of files and tables become units, and units become examples, one at a time.",
        ("data", "modalities", "vault.reading"),
    ),
    (
        "The mechanism",
        "Sampling, clipping, noise, the log of steps, and masks over a noised sum.",
        ("dp", "secagg"),
    ),
    (
        "The gradients",
        "One gradient for each unit: base, adapter, losses, engines, kept states, the self-test.",
        ("models", "training", "objectives", "bases"),
    ),
    ("The release", "What comes in and what leaves: requests, arrays, keys, seals.", ("wire",)),
    (
        "The ground",
        "Configuration, whole files on disk, processes and their confinement, errors, plug-ins.",
        ("",),
    ),
)
# Import name -> the distribution, and what ε needs of it.
OTHERS = {
    "PIL": ("pillow", "decodes one record's image"),
    "bitsandbytes": ("bitsandbytes", "rounds a base's weights where a plan asks for it"),
    "cryptography": ("cryptography", "AES for the noise and the masks, Ed25519, X25519, HKDF"),
    "dp_accounting": (
        "dp-accounting",
        "ε of what was spent",
    ),
    "av": ("av", "decodes one record's clip; for tests, makes clips of noise"),
    "duckdb": ("duckdb", "rows of a DuckDB file"),
    "huggingface_hub": ("huggingface-hub", "fetches a base that the site itself names"),
    "jinja2": ("jinja2", "renders one record's text by a chat template"),
    "numpy": ("numpy", "arrays"),
    "opacus": ("opacus", "the second engine of gradients for each record"),
    "peft": ("peft", "puts the adapter on the base"),
    "presidio_analyzer": ("presidio-analyzer", "finds identifiers in one record's text"),
    "psycopg": ("psycopg", "rows of a PostgreSQL table"),
    "pyarrow": ("pyarrow", "rows of Arrow and Parquet files"),
    "pydantic": ("pydantic", "checks types and bounds of both configuration files"),
    "safetensors": ("safetensors", "arrays in files and updates"),
    "scipy": ("scipy", "special functions of the accountants; resamples one recording"),
    "soundfile": ("soundfile", "decodes one record's recording"),
    "spacy": ("spacy", "language models of the scan for identifiers"),
    "tokenizers": ("tokenizers", "text to tokens, one record at a time"),
    "tomli_w": ("tomli-w", "writes TOML; loaded with the configuration, but no vault writes any"),
    "torch": ("torch", "forward and backward passes; rows of a product independent of each other"),
    "transformers": ("transformers", "the base's architecture, tokenizer and processors"),
}
HEAD = """# What must be right

For auditors: the code to read. [A path of two days](review.md) leads through what carries most.

ε holds at a site if this code is right: the package `fedtune/core`. It is all of fedtune that the
vault, the process that holds the records and has no network, can load to admit a plan, charge it,
read the records, train, and answer. It imports nothing of fedtune outside itself; a contract in
`pyproject.toml` forbids it. One test starts vaults in processes of their own, has them
train, answer queries, share noise and refuse, and checks that they loaded no other module of
fedtune, and no Flower. Another test checks that the package holds nothing that a vault cannot load.
Written by `python -m tests.docs.boundary`, with the first sentence of each file; not edited by
hand.

When a person at a site withdraws a patient, accepts, signs or restores, a process of its own writes
this to the ledger, with the code under *The ledger* below. In a simulation all is one process.
"""


@dataclass(frozen=True)
class Module:
    """A module of fedtune. summary: the first sentence of its docstring."""

    name: str
    lines: int
    summary: str

    @property
    def part(self) -> str:
        """Return the title of the part that it belongs to."""
        own = _short(self.name)
        fitting = {
            prefix: title
            for title, _, prefixes in PARTS
            for prefix in prefixes
            if own == prefix or not prefix or own.startswith(f"{prefix}.")
        }
        return fitting[max(fitting, key=len)]


@cache
def graph() -> grimp.ImportGraph:
    """Build the graph of imports, other distributions' top-level names included."""
    return grimp.build_graph(
        "fedtune",
        include_external_packages=True,
        exclude_type_checking_imports=True,
        cache_dir=None,
    )


def reached(beginnings: Iterable[str]) -> set[str]:
    """Return what importing `beginnings` can load, packages that hold a module included."""
    imports, waiting, found = graph(), set(beginnings), set[str]()
    while waiting:
        name = waiting.pop()
        found.add(name)
        parent = name.rpartition(".")[0]
        more = {*imports.find_modules_directly_imported_by(name), *([parent] if parent else [])}
        waiting |= more - found
    return found


def beginnings() -> tuple[str, ...]:
    """Name the vault's programs, and each plug-in of this release that a plan or a site names."""
    named = [f"{group.package}.{name}" for group in BY_NAME for name in group.release()]
    return (*PROGRAMS, *named)


def modules() -> list[Module]:
    """List fedtune.core's modules by name, after that of fedtune, which Python imports first."""
    core = {CORE, *graph().find_descendants(CORE)}
    return [_module(name) for name in ("fedtune", *sorted(core))]


def others() -> list[str]:
    """List the import names of other distributions that the vault's modules import."""
    found = {name for name in reached(beginnings()) if not is_ours(name)}
    return sorted(found - sys.stdlib_module_names)


def is_ours(name: str) -> bool:
    """Tell a module of fedtune from another distribution's."""
    return name.partition(".")[0] == "fedtune"


def _module(name: str) -> Module:
    stem = ROOT.joinpath(*name.split("."))
    path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    said = " ".join((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split())
    sentence = said.partition(". ")[0].rstrip(".:")
    return Module(name, len(text.splitlines()), sentence.replace("|", "\\|"))


def page() -> str:
    """Write the whole of docs/what-must-be-right.md."""
    listed = modules()
    return "\n".join([HEAD, *_totals(listed), *_parts(listed), *_others()])


def _totals(listed: list[Module]) -> Iterator[str]:
    yield "| part | what it does | files | lines |\n|---|---|---|---|"
    for title, does, _ in PARTS:
        of_part = [module for module in listed if module.part == title]
        lines = sum(module.lines for module in of_part)
        anchor = title.lower().replace(" ", "-")
        yield f"| [{title}](#{anchor}) | {does} | {len(of_part)} | {lines:,} |"
    yield f"| **all** | | {len(listed)} | {sum(module.lines for module in listed):,} |\n"


def _parts(listed: list[Module]) -> Iterator[str]:
    for title, does, _ in PARTS:
        yield f"## {title}\n\n{does}\n\n| file | lines | |\n|---|---|---|"
        for module in listed:
            if module.part == title and module.lines > SMALL:
                yield f"| `{_short(module.name)}` | {module.lines} | {module.summary} |"
        packages = [
            f"`{_short(module.name)}`"
            for module in listed
            if module.part == title and module.lines <= SMALL
        ]
        yield f"\nShort files of this part: {', '.join(packages)}.\n" if packages else ""


def _short(name: str) -> str:
    return name.removeprefix(CORE).lstrip(".") or CORE


def _others() -> Iterator[str]:
    yield "## Others' code\n"
    yield "The files above import these distributions, which import others in turn. ε also needs"
    yield "Python to be right, and its SQLite, which keeps the ledger.\n"
    yield "| distribution | what ε needs of it |\n|---|---|"
    for name in others():
        distribution, needed = OTHERS[name]
        yield f"| {distribution} | {needed} |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
