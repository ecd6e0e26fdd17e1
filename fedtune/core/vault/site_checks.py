"""Check a site's files, its plan and its code before a round is charged."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from fedtune.core.config import Study
from fedtune.core.errors import ConfigError, PolicyRefused
from fedtune.core.models.kept_state import check_reads
from fedtune.core.models.network import Network
from fedtune.core.models.rank_slice import rank_slice
from fedtune.core.models.teacher import teacher_for
from fedtune.core.registry import process_cache
from fedtune.core.training import selftest
from fedtune.core.training.local_round import check_trains

# Checks already passed in this process; the code does not change while it runs.
_tested: set[str] = process_cache.register("self-tests", set())
# By network, so that a network that is built again is checked again, even for an old plan.
_trains: WeakKeyDictionary[Network, set[tuple[str, int | None]]] = process_cache.register(
    "training checks", WeakKeyDictionary()
)


def self_test(study: Study, network: Network, size: int, lora_rank: int | None) -> None:
    """Run the self-test, once per process and kind of study.

    - study: the study that the site is asked to run
    - network: the model that the site built for it
    - size: the site's declared number of units
    - lora_rank: how many ranks the site trains in a round; None: the study has no adapter

    Studies are of one kind if `lora_rank`, training.engine, strategy.min_sites and the tables base,
    lora, objective, clipping, privacy and secure_aggregation are equal. Errors: SelfTestFailed."""
    names = ("base", "lora", "objective", "clipping", "privacy", "secure_aggregation")
    parts = {
        "training": {"engine"},
        "strategy": {"min_sites"},
    }  # min_sites: how many share the noise
    kind = study.model_dump_json(include={**dict.fromkeys(names, True), **parts}) + f" {lora_rank}"
    if kind not in _tested:
        selftest.require(study, network, size, lora_rank)
        _tested.add(kind)


def check_models(study: Study, network: Network) -> None:
    """Check that the study's base and its teacher, if it has one, can read records of the study's
    length, and that they keep nothing of a record for the next one. This runs once for each model
    and plan.

    Errors: PolicyRefused if one of them cannot, or if the teacher is not on this machine. Its text
    names only public values, such as models, digests and the length. ModelError if the teacher has
    another digest or cannot be loaded."""
    try:
        check_reads(study, network)
        teacher_for(study)
    except ConfigError as error:
        raise PolicyRefused(error.happened, error.expected, error.todo) from None


def check_learns(study: Study, network: Network, lora_rank: int | None) -> None:
    """Check on generated records that a step of training lowers the loss and, in a private study,
    that a row's gradient does not depend on how many other rows are computed with it. This runs
    once per network, plan and rank; the plan is recognised by its digest, which covers base and A,
    too.

    lora_rank: how many ranks the site trains in a round; None: the study has no adapter. Errors:
    ModelError."""
    kind = study.digest, lora_rank
    passed = _trains.setdefault(network, set())
    if kind not in passed:
        check_trains(study, network, rank_slice(study.lora, lora_rank, 1))
        passed.add(kind)


def check_watch(study: Study, watch: object) -> None:
    """Check that a continuous study (one without a last round) runs only at a client with --watch,
    and any other study only at a client without it.

    watch: whether `fedtune client` was started with --watch; None: nobody was asked (simulation),
    and nothing is checked. Errors: PolicyRefused."""
    if watch is None or bool(watch) == study.continuous:
        return
    if watch:
        raise PolicyRefused(
            "this site runs with --watch, and the plan has no [schedule]",
            "a study without a last round",
            "start `fedtune client` without --watch for studies with a number of rounds",
        )
    raise PolicyRefused(
        "the plan has a [schedule] and no last round, and this site runs without --watch",
        todo="read what it means with `fedtune review`; then run `fedtune client SITE --watch`",
    )
