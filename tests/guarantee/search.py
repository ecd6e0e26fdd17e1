"""Find planted strings in any bytes, in the forms in which they could have slipped out."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tests.written import written

WINDOW = 8  # bytes by which a needle is looked up before it is compared whole


def forms(text: str, ids: Sequence[Sequence[int]] = ()) -> Iterator[tuple[str, bytes]]:
    """(form, bytes) of a planted string; ids: token ids of it, as the model would see it."""
    raw = text.encode()
    yield "text", raw
    yield "text, case folded", text.lower().encode()
    yield "utf-16", text.encode("utf-16-le")
    yield "hex", raw.hex().encode()
    yield "HEX", raw.hex().upper().encode()
    yield "JSON escapes", "".join(f"\\u{ord(c):04x}" for c in text).encode()
    yield "URL escapes", "".join(f"%{b:02X}" for b in raw).encode()
    for shift in range(3):  # base64 depends on where in a longer string it begins
        body = base64.b64encode(b"\0" * shift + raw)
        start = -(-8 * shift // 6)
        yield f"base64, shift {shift}", body[start : len(body) - 4]
    for tokens in ids:
        for kind in ("<i4", "<i8", "<u2"):
            yield f"token ids, {kind}", np.array(tokens, dtype=kind).tobytes()
        yield "token ids, JSON", json.dumps(list(tokens))[1:-1].encode()
        yield "token ids, list", ",".join(map(str, tokens)).encode()


class Finder:
    """Looks for many needles at once. Errors: ValueError for a needle under WINDOW bytes."""

    def __init__(self, needles: Iterable[tuple[str, bytes]]) -> None:
        self._by_start: dict[int, list[tuple[str, bytes]]] = {}
        for form, needle in needles:
            if len(needle) < WINDOW:
                raise ValueError(f"a needle of {len(needle)} bytes is found by chance")
            start = int.from_bytes(needle[:WINDOW], "little")
            self._by_start.setdefault(start, []).append((form, needle))
        self._starts = np.array(sorted(self._by_start), dtype=np.uint64)

    def found(self, body: bytes) -> list[tuple[str, bytes]]:
        """Every needle in `body`, with its form."""
        if len(body) < WINDOW:
            return []
        data = np.frombuffer(body, dtype=np.uint8)
        hits = []
        for offset in range(0, len(body) - WINDOW + 1, step := 1 << 20):
            part = data[offset : offset + step + WINDOW - 1].astype(np.uint64)
            windows = np.zeros(len(part) - WINDOW + 1, dtype=np.uint64)
            for byte in range(WINDOW):
                windows |= part[byte : byte + len(windows)] << np.uint64(8 * byte)
            for at in np.flatnonzero(np.isin(windows, self._starts)).tolist():
                start = offset + at
                known = self._by_start[int(windows[at])]
                hits += [pair for pair in known if body.startswith(pair[1], start)]
        return hits

    def in_folder(self, folder: Path, but: Iterable[Path] = ()) -> dict[str, list[str]]:
        """The same over names and contents of all files under `folder`: place -> forms."""
        skip = {path.resolve() for path in but}
        where: dict[str, list[str]] = {}
        for path in sorted(folder.rglob("*")):
            bodies = [str(path.relative_to(folder)).encode()]
            if path.is_file() and path.resolve() not in skip:
                bodies.append(written(path))
            hits = [form for body in bodies for form, _ in self.found(body)]
            if hits:
                where[str(path.relative_to(folder))] = hits
        return where
