"""Draw the diagrams that explain fedtune: where data stays, a round, masked sums, and which party
is trusted with what.

Their texts depend on the unit of privacy, since statements about a patient do not hold if ε is for
a record. A text that is wider than its place raises an error."""

from __future__ import annotations

from collections.abc import Callable

from fedtune.evidence.dossier.drawing import Picture


def data_line(unit: str = "patient") -> Picture:
    """Draw the steps from a record to the noised sum that leaves the site. unit: the unit of
    privacy, "patient" or "record"."""
    page = Picture(920, 398, "What is where, and what leaves a site")
    page.card(16, 16, 600, 366, "home", "a site: the hospital's own machine")
    page.card(680, 16, 224, 366, "out", "outside")
    steps = [
        ("records", "files, database"),
        ("who takes part", "consent, filter, cap"),
        ("gradients", f"one per {unit}"),
        ("clipped", "each at most C"),
    ]
    for number, lines in enumerate(steps):
        x = 32 + number * 146
        page.box(x, 56, 130, 56, "box", *lines)
        if number:
            page.arrow(x - 15, 84, x - 2, 84)
    page.arrow(535, 113, 535, 143)
    page.box(470, 146, 130, 56, "box", "sum + noise", "σ·C, no seed")
    page.arrow(469, 174, 457, 174)
    page.box(324, 146, 130, 56, "box", "encoded", "as it travels")
    page.arrow(323, 174, 311, 174)
    page.box(178, 146, 130, 56, "box", "stored, signed", "sent as it lies there")
    page.box(32, 146, 130, 56, "box", "ledger", "charged beforehand")
    page.arrow(163, 174, 175, 174)
    page.arrow(243, 203, 243, 222)
    page.box(178, 224, 422, 34, "box", "the one way out")
    page.arrow(601, 241, 678, 241, "leaves")
    page.text(32, 290, "never leaves", "bold good")
    kept = [
        f"records, tokens, hidden states, a {unit}'s own gradient; the sum before the noise",
        "counts of records or patients, lengths, losses; whether anything was broken",
        "patients' keys; who said no, who withdrew; what other studies have spent",
        "the ledger itself, the log, the data sheet (unless a person hands it over)",
    ]
    page.list(32, 312, 570, kept)
    page.box(
        692, 56, 200, 92, "box", "coordinator", "mean of the sites' updates:", "the new adapter"
    )
    page.arrow(691, 100, 602, 100)
    page.text(646, 92, "adapter", "soft", "middle", 11)
    page.text(692, 180, "leaves in a round", "bold bad")
    page.text(692, 198, "of the same size each time", "soft", room=200)
    sent = [
        "the noised update",
        "its step log: σ, rate, steps",
        "plan, round, base",
        "the ledger's head, a hash",
        "the site's signature",
    ]
    page.list(692, 220, 206, sent)
    page.text(692, 322, "once, when it joins", "bold bad")
    page.list(692, 340, 206, ["name, keys, declared size", "On refusal: the rule"])
    return page


def lanes(page: Picture, names: dict[str, float], bottom: float) -> None:
    """Draw a vertical dashed line for each party, under a box with its name.

    - page: the picture to which they are added
    - names: a party's name -> the x of its line, in pixels. The box of "coordinator" has the colour
      of what is outside a site, the others that of a site
    - bottom: the y at which the lines end, in pixels"""
    for name, x in names.items():
        page.dashes(x, 50, x, bottom)
        page.box(x - 75, 16, 150, 34, "out" if name == "coordinator" else "home", name)


def call(
    page: Picture, start: float, end: float, y: float, label: str, kind: str = "arrow"
) -> None:
    """Draw a message as an arrow from one party's line to another's, with its content above the
    arrow.

    - page: the picture to which it is added
    - start, end: the x of the sender's line and of the receiver's, in pixels
    - y: the height of the arrow, in pixels from the top
    - label: the message's content, on one line; it must fit between the two lines
    - kind: "arrow" (grey), or "leaves" (orange) for what leaves a site

    Errors: ValueError if the label is too wide."""
    page.arrow(start, y, end, y, kind)
    page.text((start + end) / 2, y - 6, label, "", "middle", 12, abs(end - start) - 10)


def round_(unit: str = "patient") -> Picture:
    """Draw the protocol of a round between the coordinator and one site. unit: the unit of privacy,
    "patient" or "record"."""
    page = Picture(920, 520, "A round, between the coordinator and one site")
    hub = 120.0
    site = 470.0
    disk = 800.0
    lanes(page, {"coordinator": hub, "site": site, "site's ledger, disk": disk}, 504)
    call(page, hub, site, 86, "plan, round, adapter; receipt for the last")
    page.box(
        site - 128,
        98,
        256,
        52,
        "box",
        "policy, and what was already spent",
        "before a record is read",
    )
    call(page, site, disk, 182, "reserve: σ, rate, steps of this round")
    page.text(disk - 8, 200, "it counts from here on", "good", "end")
    page.box(
        site - 128, 212, 256, 70, "box",
        "train", f"sample; clip each {unit}'s gradient;", "add up; add noise",
    )  # fmt: skip
    call(page, site, disk, 314, "store the update; enter it as sent")
    call(page, site, hub, 350, "update, step log, seal", "leaves")
    page.box(
        16, 362, 220, 70, "box", "average", "checks seals and norms;", "judges on public records"
    )
    call(page, hub, site, 466, "next round; receipt of the ledger's head")
    call(page, site, disk, 490, "keep the receipt: a rollback shows")
    notes = [
        "asked again: the same bytes, no new charge",
        "killed before it was stored: trained and charged again",
        "over the ceiling: refused, with the rule; nothing leaves",
        "a row that is broken: left out; the answer looks the same",
    ]
    page.box(280, 362, 400, 84, "box")
    page.list(296, 384, 380, notes, "soft")
    return page


def masked_sum(page: Picture) -> None:
    page.card(16, 380, 888, 164, "box", "what the coordinator adds up")
    rows = [
        ("north", "u₁ + noise₁", "+ m₁₂ + m₁₃"),
        ("south", "u₂ + noise₂", "− m₁₂ + m₂₃"),
        ("west", "u₃ + noise₃", "− m₁₃ − m₂₃"),
    ]
    for number, (name, update, masks) in enumerate(rows):
        y = 426 + 22 * number
        page.text(40, y, name, "soft")
        page.text(110, y, update)
        page.text(225, y, masks, "key")
    page.dashes(40, 482, 350, 482)
    page.text(40, 502, "sum", "bold")
    page.text(110, 502, "u₁ + u₂ + u₃ + noise", "bold")
    page.text(275, 502, "masks cancel", "key", size=12)
    page.text(110, 524, "one dose, from what t sites cannot take out", "soft", size=12)
    notes = [
        "It opens this sum and nothing else: no site's own update.",
        "ε if at most t sites collude with it: by the noise of the other n − t.",
        "ε whatever happens: by a site's own noise alone. Both are shown.",
        "A site missing after ready: void; new noise, new keys, new charge.",
        "Asked again for the same set: the same bytes. Another set: nothing.",
    ]
    page.list(440, 426, 460, notes)


def draw_masked_round(unit: str = "patient") -> Picture:
    """Draw a round in which three sites share one dose of noise, and send masked sums. unit: the
    unit of privacy, "patient" or "record"."""
    page = Picture(920, 560, "A round whose sum alone is opened")
    places = {"coordinator": 110.0, "north": 370.0, "south": 590.0, "west": 810.0}
    lanes(page, places, 370)
    hub, *sites = places.values()
    for x in sites:
        page.box(
            x - 95,
            62,
            190,
            70,
            "box",
            "charge; train",
            "clip, sum, add noise",
            "σ/√(n − t) at each site",
        )
    for number, x in enumerate(sites):
        page.arrow(x, 158 + 9 * number, hub + 3, 158 + 9 * number, "leaves")
    page.text(118, 152, "ready: a key for this draw, signed")
    page.text(118, 208, "the set is fixed: all statements to all")
    for number, x in enumerate(sites):
        page.arrow(hub, 216 + 9 * number, x - 3, 216 + 9 * number)
    for x in sites:
        page.box(
            x - 95,
            246,
            190,
            70,
            "box",
            "are enough peers in it?",
            "a key with each other",
            "site; mask; destroy keys",
        )
    for number, x in enumerate(sites):
        page.arrow(x, 340 + 9 * number, hub + 3, 340 + 9 * number, "leaves")
    page.text(118, 334, "masked words: uniform to a reader")
    masked_sum(page)
    return page


Party = tuple[str, str, list[str], list[str], list[str]]


def parties(unit: str) -> list[Party]:
    """Return the texts of the picture `trust`. There is a tuple for each party of a study: the
    style of its heading, its name and, each as a list of lines, what it sees, what it is trusted
    with, and what it can do if it is hostile. unit: the unit of privacy, "patient" or "record"."""
    if unit == "patient":
        named = ["to name the patient", "column; that one key is", "one person"]
        known = ["know all other patients'", "records"]
    else:
        named = ["to know that ε is for a", "record: those of one", "person add up"]
        known = ["know all other records"]
    return [
        ("home", "the patient's hospital", ["records, everything", "about them"],
         ["its machine and people;", *named],
         ["nothing protects:", "it has the records"]),
        ("box", "other hospitals", ["the adapter of each", "round; no update"],
         ["nothing; where noise is", "shared: that at most t", "collude"],
         ["ε holds; fallback ε if", "more than t collude.", "They may spoil quality"]),
        ("out", "coordinator", ["noised updates;", "masked: sums alone"],
         ["quality: which bytes", "the adapter has; that", "its sites exist"],
         ["ε holds, whatever plan", "or adapter it sends.", "It may stop the study"]),
        ("box", "the network", ["TLS 1.3; sizes that are", "the same each time,", "and durations"],
         ["nothing"],
         ["may delay or cut;", "the study waits and", "resumes"]),
        ("box", "users of the model", ["the final adapter, and", "what they know else"],
         ["nothing; how it is used", "is for people to rule"],
         ["ε holds, also if they", *known]),
    ]  # fmt: skip


def trust(unit: str = "patient") -> Picture:
    """Draw which party sees what, is trusted with what, and can do what if it is hostile. unit: the
    unit of privacy, "patient" or "record"."""
    page = Picture(920, 436, f"Who is trusted with what, for a {unit}'s privacy")
    heads = [
        (92, "sees", "soft"),
        (192, "is trusted with", "key"),
        (314, "if it is hostile", "bad"),
    ]
    for number, (kind, name, *cells) in enumerate(parties(unit)):
        x = 16 + number * 179
        page.card(x, 16, 172, 404, "box", "")
        page.box(x, 16, 172, 44, kind, name)
        for (y, head, color), lines in zip(heads, cells, strict=True):
            page.text(x + 10, y, head, f"bold {color}")
            page.list(x + 10, y + 20, 160, lines)
    return page


PICTURES: dict[str, Callable[..., Picture]] = {
    "data-line": data_line,
    "round": round_,
    "masked-round": draw_masked_round,
    "trust": trust,
}
