"""FOLDER: print what RO-Crate's own validator finds in it, as JSON; without a network.

Run by a Python that has roc-validator and rocrate, which want other versions of what fedtune uses.
The JSON-LD context that the crate names is the one that rocrate brings along."""

from __future__ import annotations

import json
import sys
from importlib import resources
from typing import Any

from rocrate_validator import models, services  # type: ignore[import-not-found]
from rocrate_validator.utils.http import HttpRequester  # type: ignore[import-not-found]

CONTEXT = (resources.files("rocrate") / "data" / "ro-crate.jsonld").read_text(encoding="utf-8")


class Answer:
    """The context, whatever was asked for."""

    status_code = 200
    text = CONTEXT
    content = CONTEXT.encode()
    headers = {"Content-Type": "application/ld+json"}  # noqa: RUF012

    def json(self) -> Any:
        return json.loads(CONTEXT)

    def raise_for_status(self) -> None:
        pass


HttpRequester.get = HttpRequester.head = lambda *args, **options: Answer()
settings = services.ValidationSettings(
    rocrate_uri=sys.argv[1],
    profile_identifier="process-run-crate-0.5",
    requirement_severity=models.Severity.REQUIRED,
)
print(json.dumps([issue.message for issue in services.validate(settings).get_issues()]))
