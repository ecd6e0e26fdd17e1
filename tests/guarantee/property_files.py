"""Files of records and tiny bases that the property's worlds are made of."""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fedtune.core.models.build import build
from fedtune.public.start import start
from tests.conftest import tiny_bert, tiny_llama
from tests.guarantee.property_plans import (
    CLASSIFIES,
    OPT_OUTS,
    PUBLIC,
    SALT,
    Case,
    Plan,
    Row,
)
from tests.media import llava, whisper


def _jsonl(rows: Sequence[Any], _: bool) -> bytes:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "".join(line + "\n" for line in lines).encode()


def _columns(rows: Sequence[Any], shared: bool) -> list[str]:
    """Those of a file that several share, whatever is in it; of a file of one's own, one's own."""
    return list(
        EVERY if shared else dict.fromkeys(k for row in rows if isinstance(row, dict) for k in row)
    )


def _csv(rows: Sequence[Any], shared: bool) -> bytes:
    """Quoted as it should be, line breaks inside cells too; what is no row is one cell."""
    keys = _columns(rows, shared)
    writer = csv.writer(out := io.StringIO())
    writer.writerow(keys)
    for row in rows:
        writer.writerow([row.get(key) for key in keys] if isinstance(row, dict) else [row])
    return out.getvalue().encode("utf-8", "replace")


def _parquet(rows: Sequence[Any], shared: bool) -> bytes:
    pq.write_table(_table(rows, shared), out := io.BytesIO())
    return out.getvalue()


def _arrow(rows: Sequence[Any], shared: bool) -> bytes:
    table = _table(rows, shared)
    with pa.ipc.new_stream(out := io.BytesIO(), table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def _sqlite(rows: Sequence[Any], shared: bool) -> bytes:
    """Cells of whatever type each row has; what is no row is left out."""
    keys = _columns(rows, shared)
    good = [row for row in rows if isinstance(row, dict)]
    with closing(sqlite3.connect(":memory:")) as database:
        names = ", ".join(f'"{key}"' for key in keys)
        database.execute(f"CREATE TABLE rows ({names})")
        database.executemany(
            f"INSERT INTO rows VALUES ({', '.join('?' * len(keys))})",
            [[_stored(row.get(key)) for key in keys] for row in good],
        )
        database.commit()
        return database.serialize()


def _stored(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    return _cell(value)


def _table(rows: Sequence[Any], shared: bool) -> pa.Table:
    """Every column as text; what is no row is left out."""
    keys = _columns(rows, shared)
    good = [row for row in rows if isinstance(row, dict)]
    return pa.table({k: pa.array([_cell(row.get(k)) for row in good], pa.string()) for k in keys})


def _cell(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()


PREFIX = {"ndjson": "DocumentReference.Encounter."}  # of a file: which resources it has
EVERY = ("who", "q", "a", "b", "l", "file", "agreed")
WRITERS = {
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "sqlite": _sqlite,
    "ndjson": _jsonl,
}


def agreeing(row: Row, case: Case, version: int) -> Any:
    """A row's body with what its owner says of consent, where a site asks by a column. A line that
    says whose it is would be that patient's no, and so is left unreadable."""
    if all(place.consent != "column" for place in case.places):
        return row.body
    if isinstance(row.body, dict):
        return row.body | {"agreed": "no" if case.has_opted_out(row.owner, version) else "yes"}
    return "not JSON" if isinstance(row.body, str) and '"who"' in row.body else row.body


def write_opt_outs(folder: Path, case: Case, version: int, without: str | None) -> None:
    """Lists of hashed keys as the places of a case ask for them, for this user alone."""
    owners = [o for o in case.opted if case.has_opted_out(o, version) and o != without]
    kinds = {place.consent for place in case.places}
    if not kinds & {"list", "salted list"}:
        return
    salt = b"of the register" if "salted list" in kinds else b""
    for name in (OPT_OUTS, SALT):
        (folder / name).touch(mode=0o600)
    (folder / SALT).write_bytes(salt)
    hashed = (
        hmac.digest(salt, o.encode(), "sha256") if salt else hashlib.sha256(o.encode()).digest()
        for o in ("somebody", *owners)
    )
    (folder / OPT_OUTS).write_text("".join(each.hex() + "\n" for each in hashed))


def positions(folder: Path, kind: str, tokenizer: Path, width: int = 32) -> Path:
    """A random base of two blocks that learnt 64 positions and has no 65th."""
    from transformers import AutoTokenizer, BertConfig, BertModel, OPTConfig, OPTForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    size = {"vocab_size": len(words), "hidden_size": width, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            made: Any = BertModel(BertConfig(**size, intermediate_size=64))
        else:
            more = {
                "ffn_dim": 64,
                "word_embed_proj_dim": width,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
            made = OPTForCausalLM(OPTConfig(**size, **more))
        made.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def classifier(folder: Path, base: Path, max_length: int = 16) -> Path:
    """A run that classifies, of texts of at most so many tokens."""
    made = start(
        Plan("taught", objective="classify", max_length=max_length).study({"llama": base})
    ).study
    build(made).save(folder / "adapter")
    (folder / "plan.json").write_text(made.model_dump_json())
    return folder


def made_bases(folder: Path) -> dict[str, Path]:
    """All tiny bases, new in `folder`."""
    llama, encoder = tiny_llama(folder / "llama"), tiny_bert(folder / "encoder")
    return bases_of(folder, llama, encoder)


def bases_of(folder: Path, llama: Path, encoder: Path) -> dict[str, Path]:
    return {
        "llama": llama,
        "bert": positions(folder / "bert", "bert", encoder),
        "wide": positions(folder / "wide", "bert", encoder, 128),
        "opt": positions(folder / "opt", "opt", llama),
        "llava": llava(folder / "llava"),
        "whisper": whisper(folder / "whisper"),
        CLASSIFIES: classifier(folder / "classifier", llama),
        PUBLIC: public_text(folder / "public.jsonl"),
    }


def public_text(path: Path) -> Path:
    rows = [{"q": f"cough day {n}", "a": "yn"[n % 2], "b": "ny"[n % 2]} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
