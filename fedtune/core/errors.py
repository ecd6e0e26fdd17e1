"""Every error that fedtune raises on purpose, and the exit code each one maps to.

    FedtuneError
    ├── InputError            exit 2   something that a person wrote must change
    │   ├── ConfigError                study.toml or site.toml
    │   │   └── KeepsState             a model that couples texts (core/models/module_state.py)
    │   ├── DataError                  the site's records
    │   │   └── NotWellFormed          CSV with broken quoting (data/sources)
    │   ├── ModelError                 the base model or the adapter
    │   │   └── NoRowGradient          a layer without one (core/training/unit_gradients.py)
    │   ├── CheckpointError            a run's checkpoint (fedtune/server/store.py)
    │   ├── WireError                  arrays on the wire (core/wire/codec.py)
    │   ├── RequestError               what a site's halves pass (core/wire/requests.py)
    │   ├── SealError                  a signature on the wire (core/wire/seal.py)
    │   ├── StatementError             what ready sites signed (core/secagg/statement.py)
    │   ├── NotGenuine                 signatures of a run or of a log
    │   │   └── NotLogged              a withdrawal without a line in the log (officer/withdraw.py)
    │   └── UnknownPatient             who withdraws is in no record here (officer/withdraw.py)
    ├── Refused               exit 3   a rule said no, in words that may leave the site
    │   ├── PolicyRefused              the site's policy
    │   │   ├── Unsigned               a plan that waits for a person (core/vault/prepared.py)
    │   │   └── Held                   an answer that waits for a person (core/vault/prepared.py)
    │   ├── BudgetExceeded             the privacy budget
    │   ├── SelfTestFailed             the guarantee does not hold here (core/training/selftest.py)
    │   ├── NeverLeaves                a site's personal model (evidence/personal.py)
    │   ├── Unprepared                 the site does not know the plan (core/vault/prepared.py)
    │   ├── Void                       an attempt at a round is over (core/vault/prepared.py)
    │   └── OtherProtocol              the other side is of another release (core/wire/protocol.py)
    ├── InfrastructureError   exit 4   network, disk, another process
    │   ├── LedgerError                the privacy ledger (core/ledger/files.py)
    │   │   ├── NewerLedger            written by a newer release (core/ledger/files.py)
    │   │   └── NoRoom                 the disk has no room for an entry (core/ledger/files.py)
    │   ├── CourierLeft                a site's other container has left (launch/apart.py)
    │   ├── Unavailable                states that the store lacks (core/models/prefix_store.py)
    │   │   └── Altered                states that were changed on the disk (the same file)
    │   ├── TooFew                     strategy.min_sites are not there (server/rounds.py)
    │   ├── Terminated                 SIGTERM ended a server (launch/coordinator.py)
    │   └── DeadlinePassed             a study's --deadline (server/turns.py)
    └── AccountantsDisagree   exit 4   two computations of ε contradict each other

A message says what happened and, where this helps, what was expected and what to do. It never holds
a record's content.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any


def escape_controls(text: str) -> str:
    """Return the text with "?" in place of each control character, so that a terminal shows the
    text without interpreting it."""
    return "".join(c if c.isprintable() else "?" for c in text)


class Stopped(BaseException):
    """Raised when SIGTERM or SIGINT arrives, so that every `with` and `finally` block can clean up,
    and every process that was started is stopped."""

    def __init__(self, signum: int) -> None:
        self.name = signal.Signals(signum).name
        super().__init__(self.name)


def is_fault(error: BaseException) -> bool:
    """Return whether an exception comes from a fault in the called code, and is not a request to
    end this process or generator. Not every such fault is a subclass of Exception: a panic in a
    library's Rust code is none."""
    return not isinstance(error, Stopped | KeyboardInterrupt | SystemExit | GeneratorExit)


def describe(error: BaseException) -> str:
    """Return a text about an error for the log of this machine: the name of its class, and only for
    a FedtuneError its message too, since a library's message may quote a record."""
    message = f": {error}" if isinstance(error, FedtuneError) else ""
    return type(error).__name__ + message


class FedtuneError(Exception):
    """The base class of fedtune's errors. Its message, printed on one line, has three parts.

    - happened: what happened
    - expected: what was expected instead; "": nothing is said
    - todo: what the person should do; "": nothing is said"""

    exit_code = 4

    def __init__(self, happened: str, expected: str = "", todo: str = "") -> None:
        self.happened = happened
        self.expected = expected
        self.todo = todo
        super().__init__(happened, expected, todo)

    def __str__(self) -> str:
        parts = [self.happened]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.todo:
            parts.append(f"to do: {self.todo}")
        return "; ".join(part.rstrip(". ") for part in parts)


class InputError(FedtuneError):
    """Something that a person wrote or named must change. The base class of errors about input."""

    exit_code = 2


class ConfigError(InputError):
    """A key, type or combination in study.toml or site.toml is wrong. The message names file and
    key."""


class DataError(InputError):
    """Records cannot be used. The message holds counts and reasons, never a record's content."""


class ModelError(InputError):
    """A base model or an adapter is missing, was altered, or has another architecture than
    expected."""


class NotGenuine(InputError):
    """The content of a run's folder or of an audit log contradicts its signatures."""


class Refused(FedtuneError):
    """A rule of the site says no. The base class of refusals.

    The message leaves the site (core/vault/answers.py, `run_guarded`): it holds rules and public
    values, never anything that follows from a record, or from how much memory or disk is left."""

    exit_code = 3


class PolicyRefused(Refused):
    """A rule of the site's policy refused; the message names the rule, and no private value."""


class BudgetExceeded(Refused):
    """The round would exceed a limit of the site's privacy budget."""


class InfrastructureError(FedtuneError):
    """The network, a disk or another process failed."""

    exit_code = 4


def facts_of(error: FedtuneError) -> dict[str, str]:
    """Return a FedtuneError as a dict of texts: "error" (the name of its class), "happened",
    "expected" and "todo". `error_of` makes the error again from this dict. If the class is defined
    in another module, the name is that of its nearest parent class in this module."""
    kind = next(each for each in type(error).__mro__ if each.__module__ == __name__)
    words = {"happened": error.happened, "expected": error.expected, "todo": error.todo}
    return {"error": kind.__name__, **words}


def error_of(facts: Mapping[str, Any]) -> FedtuneError:
    """Make the error again from the dict that `facts_of` returned, for instance in another process.
    If its class is unknown, make an InfrastructureError."""
    kind = globals().get(str(facts.get("error")))
    is_ours = isinstance(kind, type) and issubclass(kind, FedtuneError)
    words = (str(facts.get(word, "")) for word in ("happened", "expected", "todo"))
    return (kind if is_ours else InfrastructureError)(*words)  # type: ignore[misc]
