"""Generate pairs with a hidden rule: an invented hospital's order of ten remedies for pain, which
no base knows. Of two remedies, the better answer is the one that is higher in the order."""

from __future__ import annotations

import random

from examples.write import Table

REMEDIES = (
    *("aspirin", "ice", "heat", "massage", "rest"),
    *("stretching", "exercise", "tape", "therapy", "cream"),
)
PLACES = ("back", "knee", "left hand", "jaw", "shoulder", "hip", "ankle", "neck", "wrist", "head")
WHEN = ("since this morning", "for two days", "for a week", "since yesterday", "for an hour")
WORDS = ("sleeps badly", "eats well", "is calm", "has no fever", "walks a little", "feels weak")
# Public text, of other sentences than the pairs, from which the adapter's frozen factor is built.
PUBLIC = (
    "Ward round, bed {n}. Pain in the {place} {when}; the chart was changed to",
    "A letter to the family doctor: because of the {place} we started",
    "Question {n} of the exam: for the {place}, what comes first? Answer:",
    "The nurse asked about the {place}. Yesterday they had ordered",
)


def order() -> list[str]:
    """Return the remedies, the best first, in the order that is the same at every site."""
    ranked = list(REMEDIES)
    random.Random("formulary").shuffle(ranked)
    return ranked


def pairs(count: int, stream: str) -> list[Table]:
    """Generate rows {prompt, chosen, rejected}; the same stream gives the same pairs."""
    draw, ranked = random.Random(f"formulary:{stream}"), order()
    rows = []
    for _ in range(count):
        place, when, how = (draw.choice(each) for each in (PLACES, WHEN, WORDS))
        prompt = f"{place.capitalize()} pain {when}, {how}. Try"
        better, worse = sorted(draw.sample(ranked, 2), key=ranked.index)
        rows.append({"prompt": prompt, "chosen": f" {better}", "rejected": f" {worse}"})
    return rows


def public(count: int) -> list[Table]:
    """Generate rows {prompt, completion} with all text in the prompt, since the frozen factor is
    computed from the states before an answer."""
    draw = random.Random("formulary:public")
    return [
        {
            "prompt": draw.choice(PUBLIC).format(
                n=draw.randint(1, 40),
                place=draw.choice(PLACES),
                when=draw.choice(WHEN),
            ),
            "completion": "",
        }
        for _ in range(count)
    ]
