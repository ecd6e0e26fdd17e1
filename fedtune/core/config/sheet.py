"""The data sheet of a site: what a person typed about its records, in a TOML file beside
site.toml.

Nothing in it is computed from records, so it may leave the site. A plan may require it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field, ValidationError

from fedtune.core.config.site import Site
from fedtune.core.config.types import SheetField, Table
from fedtune.core.errors import ConfigError
from fedtune.core.files import reading

NAME = "sheet.toml"
LONGEST = 4000
FIELDS: tuple[str, ...] = get_args(SheetField)
ASKED: dict[SheetField, str] = {
    "title": "what the data set is called",
    "description": "what the records are, in a sentence or two",
    "publisher": "who is responsible for the records, and an address for questions",
    "provenance": "which systems they come from, and how they were collected",
    "licence": "the licence, or the agreement under which they may be used",
    "legal_basis": "such as: GDPR Art. 6(1)(e) and 9(2)(j), with the national law; consent",
    "consent": "who was asked or informed, and how somebody opts out",
    "purpose": "what they may be used for",
    "collected_from": "first date of collection, as a person knows it: 2019-01-01",
    "collected_to": "last date, or: ongoing",
    "language": "such as: en, or en, de",
    "personal_information": "which kinds of personal data are in them",
    "de_identification": "such as: HIPAA Safe Harbor by hand; a tool and its version; none",
    "attested_by": "name and role of who attests to the method and to this sheet",
    "attested_on": "when: 2026-05-03",
    "known_biases": "which groups, wards or years are missing or rare",
    "limitations": "what they are not fit for",
}


Said = Annotated[str, Field(max_length=LONGEST)]


class Sheet(Table):
    """The fields that a person typed about a site's records; an empty field is "".

    >>> import fedtune
    >>> fedtune.Sheet(licence="CC0-1.0").held
    ('licence',)
    """

    title: Said = ""
    description: Said = ""
    publisher: Said = ""
    provenance: Said = ""
    licence: Said = ""
    legal_basis: Said = ""
    consent: Said = ""
    purpose: Said = ""
    collected_from: Said = ""
    collected_to: Said = ""
    language: Said = ""
    personal_information: Said = ""
    de_identification: Said = ""
    attested_by: Said = ""
    attested_on: Said = ""
    known_biases: Said = ""
    limitations: Said = ""

    @property
    def held(self) -> tuple[str, ...]:
        """The names of the fields that are filled in."""
        return tuple(name for name in FIELDS if getattr(self, name).strip())


def sheet_path(site: Site) -> Path:
    """Return the path of a site's data sheet: sheet.toml beside site.toml, NAME-sheet.toml beside
    another NAME.toml. For a site that was not loaded from a file it is in the state folder."""
    file = site.file
    if file is None:
        return site.site.state / NAME
    return file.with_name(NAME if file.name == "site.toml" else f"{file.stem}-{NAME}")


def load_sheet(site: Site) -> Sheet | None:
    """Read a site's data sheet; return None if there is no file. Errors: ConfigError."""
    path = sheet_path(site)
    if not path.exists() and not path.is_symlink():
        return None
    tables = reading.toml_in(
        path, "a data sheet", "`fedtune data describe` writes one", ConfigError
    )
    try:
        return Sheet.model_validate(tables)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path}: {key[:80]}: {first['msg']}",
            f"a text for each of these keys, and no other key: {', '.join(FIELDS)}",
        ) from None


def template() -> str:
    """Return the text of an empty data sheet that says what each field is for."""
    lines = [
        "# What only people know about this site's records. Nothing here is computed from them,",
        "# and nothing here may be: write no count and no date that you looked up in the records.",
        "# `fedtune data describe SITE` reads this file again, and attests that it describes them.",
    ]
    for name in FIELDS:
        lines += ["", f"# {ASKED[name]}", f'{name} = ""']  # type: ignore[index]
    return "\n".join(lines) + "\n"


def list_lacking(sheet: Sheet | None, asked: tuple[SheetField, ...]) -> tuple[str, ...]:
    """Return those of the fields `asked` that the sheet leaves empty; all if there is no sheet."""
    held = sheet.held if sheet else ()
    return tuple(name for name in asked if name not in held)
