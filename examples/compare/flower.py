"""Flower's differential privacy: a strategy wrapper, its accountant, and the mod for local DP.

Three clients train for real rounds in one process: Flower's own strategy and ClientApp, and the
messages as they would go over the network. A client's model is a vector of 1,000 numbers, to which
it adds its update, whatever it was sent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp import (
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg, Strategy
from flwr.supercore.task_identity import TaskIdentity

from fedtune.flower.grid import RUN_ID, InProcessGrid

Vector = npt.NDArray[np.float32]
C, SIGMA, DELTA = 1.0, 1.0, 1e-5
NOTHING = np.zeros(1_000, np.float32)
LITTLE = np.full(1_000, 1e-6, np.float32)
MUCH = np.ones(1_000, np.float32)  # of norm 32, clipped to C
UPDATES = (MUCH, LITTLE, LITTLE)
EQUAL, UNEQUAL = (1, 1, 1), (1_000, 1, 1)  # how many examples each client says that it has


class Watched(InProcessGrid):
    """The grid of one process, which keeps the replies that the server received last."""

    replies: Sequence[Message] = ()

    def send_and_receive(self, messages: Iterable[Message], **options: Any) -> list[Message]:
        replies = super().send_and_receive(messages, **options)
        if replies:
            self.replies = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        return replies


def train(
    strategy: Strategy,
    updates: Sequence[Vector],
    examples: Sequence[int] = EQUAL,
    mods: Sequence[Any] = (),
    rounds: int = 1,
) -> tuple[Vector | None, Sequence[Message]]:
    """Train with Flower; return the model, if a round gave one, and the last round's replies by
    client, as the server received them."""
    app = ClientApp()

    @app.train(mods=list(mods))
    def add_update(message: Message, context: Context) -> Message:
        client = int(Path(str(context.node_config["site"])).name)
        model = vector(message) + updates[client]
        count = MetricRecord({"num-examples": examples[client]})
        content = RecordDict({"arrays": ArrayRecord([model]), "metrics": count})
        return Message(content, reply_to=message)

    for name in ("run_id", "node_id", "task_id"):  # as flwr-serverapp does when it starts
        setattr(TaskIdentity, name, RUN_ID)
    grid = Watched([Path(str(client)) for client in range(len(updates))], app)
    result = strategy.start(grid, ArrayRecord([NOTHING]), rounds)
    models = result.arrays.to_numpy_ndarrays()
    return (models[0] if models else None), grid.replies


def vector(message: Message) -> Vector:
    """Return the array in a message."""
    (array,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    return np.asarray(array, np.float32)


def wrapped(sigma: float = SIGMA, accountant: RdpAccountant | None = None) -> Strategy:
    """Return FedAvg under central DP with clipping at the client, as Flower's how-to builds it."""
    plain = FedAvg(fraction_evaluate=0.0)
    return DifferentialPrivacyClientSideFixedClipping(plain, sigma, C, 3, accountant=accountant)


def accountant(max_epsilon: float | None = None) -> RdpAccountant:
    """Make Flower's accountant of a population of three clients."""
    relation, sampling = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
    return RdpAccountant(PrivacyConfig(DELTA, 3, relation, sampling, max_epsilon))


def differences() -> Iterator[str]:
    """Yield what Flower's code does, a line each."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    clipping = [fixedclipping_mod]

    (model, replies), (again, same) = (train(wrapped(), UPDATES, mods=clipping) for _ in range(2))
    yield f"two runs: the same model: {np.array_equal(model, again)}"
    yield f"two runs: the server received the same: {_equal(replies, same)}"
    with_it, without = (
        train(wrapped(1e-9), (update, LITTLE, LITTLE), UNEQUAL, clipping)[0]
        for update in (MUCH, LITTLE)
    )
    moved = float(np.linalg.norm(with_it - without)) / C
    yield f"1,000 examples beside 1 and 1: moves the mean by {moved:.2f} C"
    yield f"1,000 examples beside 1 and 1: the noise is for {1 / 3:.2f} C"
    yield f"1,000 examples beside 1 and 1, with an accountant: {_refusal(UNEQUAL)}"
    model, replies = train(wrapped(), (NOTHING, LITTLE, LITTLE), mods=clipping)
    yield f"an update of zeros: the client's reply is {replies[0].error.reason}"
    yield f"an update of zeros: the round gives a model: {model is not None}"

    kept = accountant()
    train(wrapped(accountant=kept), UPDATES, mods=clipping, rounds=3)
    yield f"the accountant after three rounds: ε = {kept.get_epsilon(DELTA):.2f}"
    yield f"four rounds with max_epsilon = 8: {_refusal(EQUAL, 8.0, rounds=4)}"
    yield f"the accountant of the next run: ε = {accountant().get_epsilon(DELTA):.2f}"
    edited = accountant()
    edited.load_state_dict({**kept.state_dict(), "compositions": []})
    yield f"a saved state without its rounds is loaded: ε = {edited.get_epsilon(DELTA):.2f}"

    local = LocalDpMod(clipping_norm=C, sensitivity=0.001, epsilon=1.0, delta=DELTA)
    left, same = (_noised(local) for _ in range(2))
    noise = float(np.std(vector(left[0]) - LITTLE))
    yield f"LocalDpMod, ε = {local.epsilon:g}: noise of {noise:.3f} C on an update clipped to C"
    yield f"LocalDpMod, after the same seed: what leaves is the same: {_equal(left, same)}"


def _noised(mod: LocalDpMod) -> Sequence[Message]:
    """Return what leaves one client under the mod, after NumPy's generator was seeded."""
    np.random.seed(0)
    alone = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    return train(alone, [LITTLE], mods=[mod])[1]


def _refusal(examples: Sequence[int], ceiling: float | None = None, rounds: int = 1) -> str:
    """Train with an accountant; return why Flower does not."""
    strategy = wrapped(accountant=accountant(ceiling))
    try:
        train(strategy, UPDATES, examples, [fixedclipping_mod], rounds)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(' (')[0]}"
    return "it trains"


def _equal(some: Sequence[Message], others: Sequence[Message]) -> bool:
    return all(
        np.array_equal(vector(one), vector(other)) for one, other in zip(some, others, strict=True)
    )


if __name__ == "__main__":
    print(*differences(), sep="\n")
