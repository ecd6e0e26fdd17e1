"""The command that verifies a run's folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune import __version__
from fedtune.cli.exit_codes import command
from fedtune.core.errors import escape_controls

if TYPE_CHECKING:
    from fedtune.evidence.verify import Verified

PATH = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="A run, an exported model, or a dossier.", show_default=False
    ),
]
TRUST = Annotated[
    str,
    typer.Option(
        metavar="FINGERPRINT",
        help="Trust signatures of the consortium with this fingerprint, as its coordinator "
        "read it out. A fingerprint that was copied from the folder or from this command "
        "proves nothing. Without this option no signature is trusted.",
        show_default=False,
    ),
]
SITES = Annotated[
    list[str] | None,
    typer.Option(
        "--site",
        metavar="NAME=FINGERPRINT",
        help="Refuse the run unless site NAME signed with keys of this fingerprint, as the "
        "site read it out; may be repeated.",
    ),
]
APPROVED = Annotated[
    list[str] | None,
    typer.Option(
        "--approved",
        metavar="FINGERPRINT",
        help="For a dossier: refuse it unless this approver's key signed it; may be repeated.",
    ),
]


SIMULATION = Annotated[
    bool,
    typer.Option(
        "--simulation",
        help="Accept a simulation, whose keys were all made on one machine: exit with 0 if "
        "nothing was changed since it was signed.",
    ),
]


OWN = Annotated[
    Path | None,
    typer.Option(
        "--own",
        metavar="SITE",
        help="At a site: also compare the run with the ledger of this site.toml. Exit code 2 if "
        "they contradict each other, 3 if the run lacks rounds that this site released.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(verify)


def verify(
    path: PATH,
    trust: TRUST = "",
    sites: SITES = None,
    approved: APPROVED = None,
    simulation: SIMULATION = False,
    own: OWN = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Verify a run that somebody handed over: signatures, digests, and ε from the sites' step logs.

    For a dossier, also verify that each of its figures is the run's, and who approved it. This
    works offline, from the folder alone. If anything was changed, it is named, and the exit code is
    2. A folder carries its own keys, so it proves something only to a reader who knows whose they
    are: without --trust, or if somebody else signed, the exit code is 3. It is also 3 for a run
    that another release of fedtune made, or a dossier whose pages another release wrote, since this
    release cannot compare their sentences, and for a simulation whatever --trust says, unless
    --simulation is given: nobody vouches for a simulation's key."""
    from fedtune.core.errors import ConfigError, Refused
    from fedtune.evidence.verify import verify as check

    pairs = dict(text.partition("=")[::2] for text in sites or ())
    if not all(pairs.values()):
        raise ConfigError("--site is given without a fingerprint", "NAME=FINGERPRINT")
    found = check(path, trust, pairs)
    _check_approved(path, found, approved or [])
    typer.echo(json.dumps(asdict(found), ensure_ascii=False) if as_json else _lines(found))
    if own:
        _compare_with(own, path, found, quiet=as_json)
    if found.simulated and not simulation:
        raise Refused(
            "unchanged, but a simulation: anybody can sign such a folder, so nobody vouches for it",
            "a consortium's run",
            "use --simulation if it is enough to know that nothing was changed",
        )
    if not (found.trusted or found.simulated):
        raise Refused(
            "consistent, signer unknown: whoever made this folder may have made its keys too",
            "the fingerprint of a consortium that you know",
            "give --trust FINGERPRINT as the coordinator reads it out, not copied from here",
        )
    if found.dossier and not found.dossier["word by word"]:
        release = found.dossier["made by"]
        raise Refused(
            f"the run is as shown here; but fedtune {release} wrote the dossier's pages, so nobody "
            "but its signer vouches for them",
            f"pages that fedtune {__version__} wrote",
            f"verify the dossier with fedtune {release}, or rely on what stands here",
        )
    if found.made_by != __version__:
        raise Refused(
            f"nothing was changed; but by its report fedtune {found.made_by} made the run, so its "
            "sentences about quality were not compared with its figures",
            f"a run that fedtune {__version__} made",
            f"verify the run with fedtune {found.made_by}, or rely on what stands here",
        )


def _compare_with(own: Path, path: Path, found: Verified, *, quiet: bool) -> None:
    """Compare a run with what a site's own ledger says of it, and print the result unless `quiet`.
    own: the path of the site file. path: the run's folder. found: what verifying it gave. Errors:
    NotGenuine; Refused if the run lacks rounds that the site released."""
    from fedtune.core.config import load_site
    from fedtune.core.errors import Refused
    from fedtune.core.registry.rounding import rounded_up
    from fedtune.officer.claims import compare

    told = compare(load_site(own), path, found)
    cost = ""
    if told.paid is not None or not told.known:
        stated = "nothing" if told.stated is None else f"ε = {rounded_up(told.stated)}"
        paid = "not known" if told.paid is None else rounded_up(told.paid)
        cost = f"; the run states {stated} for it, this ledger paid ε = {paid}"
        cost += "" if told.whatever is None else f" ({rounded_up(told.whatever)} whatever happens)"
    if not quiet:
        here = f"as {told.name}, {len(told.rounds)} rounds" if told.name else "took no part"
        typer.echo(escape_controls(f"this site    {here}, as its own ledger has them{cost}"))
    if told.repeated and not quiet:
        listed = [f"round {n} ({count} answers)" for n, count in told.repeated.items()]
        more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
        typer.echo(
            f"{'':13}charged and released more than once: {', '.join(listed[:20])}{more};\n"
            f"{'':13}the run holds one answer to a round at most: ask the coordinator why it asked "
            "again"
        )
    missing = {"in": told.left_out, "to the queries after": told.unanswered}
    if lacks := [
        f"{where} rounds {', '.join(map(str, rounds[:20]))}"
        for where, rounds in missing.items()
        if rounds
    ]:
        raise Refused(
            f"{path}: lacks what this site released {' and '.join(lacks)}{cost}",
            "every update and answer that this site released",
            "ask the coordinator whether they were lost or late; what was paid for stays paid",
        )


def _signer_lines(found: Verified) -> list[str]:
    """Describe, in lines of text, whose key signed the folder, and what the given fingerprint
    proves."""
    if found.simulated:
        return [f"signed by    a simulation's own key {found.signer}: anybody can make one"]
    lines = [f"signed by    the coordinator of consortium {found.signer}"]
    if found.trusted:
        lines[0] += ", as you gave it:"
        lines.append(f"{'':13}that proves something only if you heard it elsewhere, as by phone")
    return lines


def _check_approved(path: Path, found: Verified, wanted: list[str]) -> None:
    from fedtune.core.errors import Refused
    from fedtune.evidence.fingerprints import match_fingerprints

    have = [one["fingerprint"] for one in found.dossier.get("approvals", ())]
    for fingerprint in wanted:
        if not any(match_fingerprints(fingerprint, one) for one in have):
            raise Refused(
                f"{path}: nobody with the key {fingerprint} approved this dossier",
                "a dossier that this key approved",
            )


def _dossier_lines(dossier: dict[str, Any]) -> list[str]:
    lines = [f"dossier      {dossier['files']} files, as they were signed at {dossier['made']}; "]
    if dossier["word by word"]:
        lines[0] += "its pages as fedtune writes them of this run"
    else:
        lines[0] += f"its pages by fedtune {dossier['made by']}, another release"
    if dossier["its word"]:
        lines.append(f"not compared {', '.join(dossier['its word'])}: the coordinator's word alone")
    for one in dossier["approvals"]:
        site = f", the key of site {one['site']}" if one["site"] else ""
        said = (one["name"], one["role"], one["reason"])
        quoted = ", ".join(f'"{" ".join(text.split())}"' for text in said)
        lines.append(f"approved     by key {one['fingerprint']}{site}, {one['date']}: {quoted}")
    return lines if dossier["approvals"] else [*lines, "approved     by nobody yet"]


def _absent_lines(found: Verified) -> list[str]:
    """Describe, in lines of text, which sites or rounds of the plan are not in the folder, and what
    ε would be with them."""
    from fedtune.core.registry.rounding import rounded_up

    lines = []
    for name, lacks in found.absent.items():
        parts = []
        if number := lacks.get("rounds"):
            parts.append(f"its updates of {number} of the plan's rounds")
        if number := lacks.get("answers"):
            parts.append(f"its answers to {number} of the plan's queries")
        line = f"not here     {name}: {' and '.join(parts)}"
        if "epsilon" in lacks:
            line += f"; with one more answer to each ε = {rounded_up(lacks['epsilon'])}"
        if "fallback" in lacks:
            line += f" ({rounded_up(lacks['fallback'])} whatever happens)"
        if "answers_epsilon" in lacks:
            line += f"; with all answers to queries ε = {rounded_up(lacks['answers_epsilon'])} more"
        lines.append(line)
    if lines:
        lines.append(
            f"{'':13}whether a site was away or somebody left them out cannot be seen here:"
        )
        lines.append(f"{'':13}`fedtune ledger` at the site says what it spent")
    return lines


def _lines(found: Verified) -> str:
    from fedtune.core.registry.rounding import rounded_up
    from fedtune.report.declared import declared_line, free_query_line

    claim, more = "NOT PRIVATE", list[str]()
    if found.epsilon is not None:
        claim = f"ε = {rounded_up(found.epsilon)}, δ = {found.delta:g} per {found.unit}, "
        claim += f"from the step logs that {len(found.sites)} sites signed"
        if found.capped:
            claim += "; at most the plan's for one patient, whom the sites then leave out"
        if found.with_queries is not None:
            more.append(
                f"with the answers to private queries ε = {rounded_up(found.with_queries)}, "
                f"for a {found.unit} in both files of a site"
            )
        if found.with_teacher is not None:
            more.append(
                f"with its teacher's training ε = {rounded_up(found.with_teacher)}, by the "
                "coordinator's report: verify the teacher's run, too"
            )
        if found.fallback is not None:
            more.append(
                f"if {found.assumption}; whatever happens, ε = {rounded_up(found.fallback)}"
            )
    lines = [
        f"study        {found.study}, {found.plan}",
        f"privacy      {claim}",
        *(f"{'':13}{line}" for line in more),
        *_signer_lines(found),
        f"files        {found.files}, as they were signed; {found.updates} updates",
    ]
    if found.made_by != __version__:
        lines.append("not compared the sentences about quality in report.json and report.md, which")
        lines.append(f"{'':13}by the report are of another release, fedtune {found.made_by}")
    if found.released == "start":
        lines.append("released     what public text alone gives; trained/, signed too, is what the")
        lines.append("             sites' records made of it, and was worse by the report")
    elif found.released:
        lines.append("released     the trained model, by the plan's rule")
    if found.verdicts:
        told = ", ".join(f"{number} {verdict}" for verdict, number in found.verdicts.items())
        lines.append(f"versions     {told}: each verdict follows from what its comparison saw")
    for name, site in found.sites.items():
        spent = ""
        if "steps" in site:
            spent = f"ε = {rounded_up(site['epsilon'])}, {site['steps']} steps"
        keys = site["fingerprint"] or f"key {site['key'][:16]}…, not enrolled"
        lines.append(f"site         {name}: {keys}; {spent}".rstrip("; "))
    lines += _absent_lines(found)
    if found.dossier:
        lines += _dossier_lines(found.dossier)
    if line := declared_line({"declared": found.declared}):
        lines.append(f"declared     by the coordinator's report: {line}")
    if line := free_query_line({"free_query": [*found.free_query]}):
        lines.append(f"NOT COVERED  by the coordinator's report: {line}")
    if found.left_out:
        lines.append(f"NOT COVERED  by the coordinator's report: {found.left_out}")
    if found.not_signed:
        lines.append(f"not signed   {', '.join(found.not_signed)}")
    if "alone" in found.not_signed:
        lines.append(
            "             alone: what the report's table of each site alone rests on, which"
        )
        lines.append("             is the coordinator's word")
    if found.exported:
        lines.append("exported     from that run; that these weights come from its adapter is")
        lines.append("             not proven here: export the run again, and compare")
    return "\n".join(escape_controls(line) for line in lines)
