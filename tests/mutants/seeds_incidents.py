"""Bugs where a person froze a site's ledger, or left a consortium."""

from __future__ import annotations

from tests.mutants.mutant import one

T_FREEZE = "tests/client/test_freeze.py::"

# fmt: off
MUTANTS = (
    one(
        "incidents", "a-freeze-is-not-looked-for-under-the-lock",
        "fedtune/core/ledger/ledger.py",
        "            self._check_not_frozen()\n            self._ask(dataset, permit)\n",
        "            self._ask(dataset, permit)\n",
        T_FREEZE + "test_a_frozen_ledger_reserves_for_nobody",
        "a round is charged and trained after a person froze the ledger",
    ),
    one(
        "incidents", "a-round-under-way-is-answered-although-frozen",
        "fedtune/core/vault/answers.py",
        "            site.home.check_not_frozen()  # again: a round lasts, and a person may have "
        "frozen it\n", "",
        T_FREEZE + "test_a_round_under_way_is_paid_and_not_answered",
        "what a person wanted to stop leaves all the same",
    ),
    one(
        "incidents", "a-restore-thaws", "fedtune/officer/freeze.py",
        "    if ledger.frozen or not _was_frozen(ledger.folder, ledger.key.public):\n"
        "        return False\n", "    return False\n",
        T_FREEZE + "test_a_restore_that_lost_a_freeze_freezes_again",
        "a ledger put back to a copy answers again before a person lifted the freeze",
    ),
)
