"""Where a model comes from: the runs that it was made of, what they cost, and whether they may be
used beside private records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedtune.derive import composed_epsilon
from fedtune.errors import Refused
from fedtune.models.loaded import LoadedModel
from fedtune.models.run import Run


def require_private(model: LoadedModel, what: str, accepted: Sequence[str] = ()) -> None:
    """Whether `model` may set targets for private records: a base, or a run under (ε, δ).

    A model that saw the records without noise makes each record's target depend on all the others.
    accepted: digests that the user declares to be public. Errors: Refused."""
    if model.study is None or model.study.private or model.digest in accepted:
        return
    raise Refused(
        f'the {what} is a run with privacy = "off" ({model.digest})',
        "a base, or a run that was trained under (ε, δ)",
        "if it never saw a private record, declare its digest as public",
    )


def parent(run: Run, model: LoadedModel, role: str) -> dict[str, Any]:
    """What a report says of one run that another model was made of. Errors: InputError."""
    return {
        "name": run.study.study.name,
        "role": role,
        "plan": run.study.digest,
        "digest": model.digest,
        "report": run.report,
    }


def carried_over(parents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The body's `private` and `privacy` of what was made of `parents`, and `parents` as "derived"
    keeps them: each run counts once."""
    found = {p["digest"]: p["report"] for p in parents}
    private = all(body.get("private") for body in found.values())
    privacy: dict[str, Any] = {"warning": "one of its runs was trained without privacy"}
    if private:
        privacy = composed_epsilon.composed(list(found.values()))
    said = [
        {key: value for key, value in p.items() if key != "report"}
        | {"privacy": {k: p["report"].get("privacy", {}).get(k) for k in ("epsilon", "delta")}}
        for p in parents
    ]
    return {"private": private, "privacy": privacy, "parents": said}
