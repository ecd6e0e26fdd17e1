"""What a site keeps of a plan that it admitted (`Prepared`), its answers to the coordinator
(`Admission`, `Update`), and the refusals for which an answer has a status of its own."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from safetensors.numpy import load

from fedtune.core.config import Study
from fedtune.core.dp.non_private import NonPrivatePlan
from fedtune.core.dp.plan import DpPlan
from fedtune.core.dp.steplog import Step
from fedtune.core.errors import PolicyRefused, Refused
from fedtune.core.models.lora import Arrays
from fedtune.core.models.network import Network
from fedtune.core.models.rank_slice import rank_slice, trained_slice
from fedtune.core.wire.codec import Encoded, layout, shapes


class Unprepared(Refused):
    """The site does not know the plan, since it was restarted or joined late, or it must read its
    settings anew. The coordinator then sends the plan again."""


def build_unprepared() -> Unprepared:
    """Build the error of a site that has to be sent the plan again. Its text, which the coordinator
    gets, is the same whatever the cause: the cause may be another membership of the same hospital,
    of which the coordinator must learn nothing."""
    return Unprepared("this site does not know the plan", todo="send the plan again")


class Unsigned(PolicyRefused):
    """Nobody at the site has signed the plan; until then nothing of it runs here."""


class Held(PolicyRefused):
    """An answer waits until a person at the site releases it (core/vault/airlock.py)."""


class Void(Refused):
    """A site's part in this attempt at a round of shared noise is over. In another attempt the site
    draws new noise."""


@dataclass(frozen=True)
class Admission:
    """A site's answer to a plan. Every field is public.

    - admitted: whether the site takes part
    - reason: why it does not, or ""
    - name: the site's name
    - declared_size: the site's declared number of units
    - lora_rank: how many ranks the site trains; None unless the plan lets sites choose
    - declared: "public" or "generated" if the site takes part and a person declared its data to be
      so; else None
    - free_query: whether the site takes part and a query or a view selects its records, which no ε
      covers
    - waits: whether the plan is not admitted yet because a person at the site has to sign it"""

    admitted: bool
    reason: str
    name: str
    declared_size: int
    lora_rank: int | None = None  # how many ranks it trains, where the plan lets sites choose
    declared: str | None = None  # public or generated, where a person declared the data to be
    free_query: bool = False  # a query or a view selects the records: outside the guarantee
    waits: bool = False  # not admitted, for a person at the site has yet to sign the plan

    def fields(self) -> dict[str, str | int]:
        """Return the answer's fields by name, as they are sent. lora_rank and declared are left out
        if they are None, and free_query if it is False. "status" and "reason" are included only if
        the plan waits for a person."""
        fields: dict[str, str | int] = {"name": self.name, "declared_size": self.declared_size}
        fields |= {} if self.lora_rank is None else {"lora_rank": self.lora_rank}
        fields |= {} if self.declared is None else {"declared": self.declared}
        fields |= {"status": "waiting", "reason": self.reason} if self.waits else {}
        return fields | ({"free_query": True} if self.free_query else {})


@dataclass(frozen=True, repr=False)
class Update:
    """What a site sends back after an order.

    - delta: the arrays to send, by name: the trained minus the received adapter, masked words, or
      the sums that answer a query
    - events: the numbers of noised steps that the study has run at the site (`step_summary`)
    - said: further texts that are sent and sealed with the arrays, by name"""

    delta: Encoded
    events: list[dict[str, float | int]]
    said: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Prepared:
    """A study that this site admitted, ready to train.

    - network: the model that the site built for it
    - plan: this site's plan for the training
    - frozen: the arrays that the study never trains, such as LoRA's A, fp32 by name
    - coordinator: the public key that signed the plan
    - lora_rank: how many ranks the site trains throughout the study, even if site.toml is changed;
      None if the study has no adapter"""

    study: Study
    network: Network
    plan: DpPlan | NonPrivatePlan
    frozen: Arrays
    coordinator: str
    lora_rank: int | None  # as declared: it stays for the study, whatever site.toml says since

    @property
    def private(self) -> DpPlan | None:
        return self.plan if isinstance(self.plan, DpPlan) else None


def check_waiting_update(prepared: Prepared, round_: int, payload: bytes) -> None:
    """Check that a stored update still has the shapes that this site would send now.

    payload: the bytes of the stored update, a safetensors file; round_: the number of the update's
    round, from which it follows which columns train (rank_slice).

    Errors: PolicyRefused if the site was restarted with another rank after it trained."""
    columns = rank_slice(prepared.study.lora, prepared.lora_rank, round_)
    sent = prepared.network.update_parameters().items()
    trained = {name: tuple(trained_slice(name, values, columns).shape) for name, values in sent}
    expected = layout(trained, prepared.study.wire.update)
    if shapes(load(payload)) != {name: form.shape for name, form in expected.items()}:
        raise PolicyRefused(
            "site.lora_rank was changed while an update of this round waits to be sent",
            todo="set it back until this study has ended",
        )


def step_summary(steps: list[Step]) -> list[dict[str, Any]]:
    """Count the noised steps of a step log. Return one dict for each combination of σ, sampling
    rate, clipping norm and records per unit that occurs: {"sigma", "q", "max_grad_norm", "records",
    "steps"}, where "steps" is the number of steps with this combination. No figure depends on a
    record."""
    counts = Counter(
        (s.noise_multiplier, s.sampling_rate, s.max_grad_norm, s.records) for s in steps
    )
    return [
        {"sigma": sigma, "q": rate, "max_grad_norm": norm, "records": records, "steps": count}
        for (sigma, rate, norm, records), count in counts.items()
    ]


def metadata_of(payload: bytes) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file. payload: the bytes of the file."""
    length = int.from_bytes(payload[:8], "little")
    metadata: dict[str, str] = json.loads(payload[8 : 8 + length])["__metadata__"]
    return metadata
