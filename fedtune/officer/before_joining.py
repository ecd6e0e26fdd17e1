"""Check a site before it takes part, each time that its client starts."""

from __future__ import annotations

import logging
from typing import Literal

from fedtune.core.config import Site
from fedtune.core.config.patient_columns import patient_columns
from fedtune.core.data import scan_engine
from fedtune.core.data.declared_size import describe_wrong_size
from fedtune.core.data.records import count_otherwise_alone, read_records
from fedtune.core.errors import DataError, describe
from fedtune.core.ledger.adopted import check_has_adopted
from fedtune.core.ledger.files import DATABASE, LedgerError
from fedtune.core.ledger.patient_column import describe_withdrawn_before
from fedtune.core.vault import studies
from fedtune.core.vault.declared import (
    allow_declared,
    check_private,
    check_restored,
    sign_declarations,
)
from fedtune.homes.known_homes import check_head, check_home
from fedtune.homes.opening import find_ledger
from fedtune.officer.leave import check_trusted, consortium_of
from fedtune.officer.sheet import check_attested_records, check_sheet
from fedtune.officer.step_log import check_step_log

log = logging.getLogger("fedtune.site")
SAMPLE = 8  # the number of units that are converted a second time, without the other units


def check_before_joining(site: Site) -> None:
    """Check a site for problems that a person should correct before it takes part.

    Guarantee: while a study is running here, no private record decides whether the site joins,
    since a site that does not come back after a restart would reveal something about its records.
    Problems with the records are then only warnings on this machine. The rounds continue as if the
    client had not been restarted; if no record can be read, the site sends noise alone.

    Errors:
    - PolicyRefused, ConfigError or InputError: settings or data sheet are wrong, another home pays
      for the same records, data that the site declares public or generated may not be used, or a
      person has yet to accept what a restore of the ledger may have lost
    - Refused: a person here distrusts the consortium; or an audit log, in which a person may have
      said so, was taken away, and a new log was begun
    - NotGenuine: such a log was taken away or changed, and no new log was begun
    - LedgerError, also if the ledger's folder was put back to an earlier copy of itself, steps of a
      study that is running are missing in the step log, or a hospital's ledger lost what it adopted
      from this site
    - DataError or PolicyRefused because of the records, only if no study is running"""
    allow_declared(site)
    check_home(site)
    if consortium := consortium_of(site):
        check_trusted(site.home, consortium)
    sign_declarations(site)
    ledger = find_ledger(site.home) if (site.home / DATABASE).exists() else None
    if ledger:
        check_head(ledger)
    if ledger and (said := describe_withdrawn_before(ledger, patient_columns(site))):
        log.warning("%s", said)
    if site.hospital:
        check_has_adopted(site.site.state, ledger)
    check_step_log(site)
    check_restored(site)
    check_sheet(site)
    checks = (check_scan, check_private, check_attested_records, check_records, check_conversion)
    for check in checks:
        try:
            check(site)
        except LedgerError:
            raise
        except Exception as error:
            if not (names := studies.under_way(site.site.state)):
                raise
            log.warning(
                "%s. This site joins all the same, since a study is under way here (%s): whether "
                "the site comes back must not depend on its records. If the study is over, "
                "`fedtune purge` ends it here",
                describe(error),
                ", ".join(names.values()),
            )


def check_scan(site: Site) -> None:
    """Check that the model of the site's [data.scan] is in the cache, if records are redacted or
    left out by it; a model that is missing is fetched. Errors: ModelError, InfrastructureError."""
    for table in (site.data, site.evaluation):
        if table and table.scan and table.scan.action != "warn":
            scan_engine.model_folder()


def check_records(site: Site) -> None:
    """Check that the site has at least 2 usable units, before there is a study. If the number of
    units is far from the declared size, log a warning. Errors: DataError for fewer than 2 units."""
    unit: Literal["patient", "record"] = "patient" if site.data.columns.patient else "record"
    records, _ = read_records(site.data, unit=unit)
    units = len({record.unit for record in records})
    for line in describe_wrong_size(units, site.site.declared_size, unit):
        log.warning("%s; site.declared_size can be changed until the first study", line)
    if units < 2:
        raise DataError(
            f"{site.data.where}: fewer than 2 usable {unit}s",
            f"at least 2 {unit}s",
            "add records, or check data.columns",
        )


def check_conversion(site: Site) -> None:
    """If a plug-in converts the site's records, check for a sample of units that the plug-in
    converts a unit in the same way with and without the other units. Errors: DataError."""
    for data in filter(None, (site.data, site.evaluation)):
        otherwise = count_otherwise_alone(data, SAMPLE)
        if otherwise:
            raise DataError(
                f"{data.where}: {otherwise} of at most {SAMPLE} units that were "
                "tried are converted differently when they are converted alone",
                "a conversion that depends on a unit's own rows only",
                "check the plug-in: fedtune check-plugin --group converters",
            )
