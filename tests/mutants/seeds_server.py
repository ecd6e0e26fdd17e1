"""Seeded bugs on the coordinator's side: whose name an answer counts for, how much of one is read,
who may keep others from the door."""

from __future__ import annotations

from tests.mutants.mutant import Mutant
from tests.mutants.mutant import one as _one

ADMISSION = "server/admission.py"
T_NAMES = "tests/server/test_names.py::"
NOBODY = T_NAMES + "test_nobody_is_thrown_out_or_shadowed_by_another"

NAME_MUTANTS = (
    Mutant(
        "names", "a-refusal-counts-for-whom-it-names", ADMISSION,
        (
            ('return _Said(status, clean(record.get("reason")) or "no reason given")',
             'return _Said(status, clean(record.get("reason")), str(record.get("name")))'),
            ("self._name_of(reply.node, said), said.status",
             "said.name or self._name_of(reply.node, said), said.status"),
        ),
        (NOBODY,), "one admitted site throws another out of the run",
    ),
    _one(
        "names", "the-registry-is-not-asked-for-a-name", ADMISSION,
        "            return vouched.name\n", "            return said.name or vouched.name\n",
        NOBODY, "who comes first with a name has it",
    ),
    _one(
        "names", "any-name-may-be-claimed", ADMISSION,
        "if said.name != name:", "if not said.name:",
        NOBODY, "an answer in another's name is taken in",
    ),
    _one(
        "names", "an-enrolled-name-has-any-key", ADMISSION,
        "self.enrolled().get(node) != Member(name, said.key)",
        "getattr(self.enrolled().get(node), 'name', '') != name",
        "tests/server/test_apps.py::"
        "test_only_an_enrolled_key_is_admitted_and_a_revoked_one_is_not_counted",
        "the signing key at enrolment is not the one that seals",
    ),
    _one(
        "names", "a-name-of-yesterday-is-anybodys", ADMISSION,
        'name = said.name if self.keys.get(said.name, said.key) == said.key else ""',
        "name = said.name",
        T_NAMES + "test_where_nobody_vouches_a_name_keeps_its_key_over_resume",
        "over --resume, a name goes to whoever asks first",
    ),
)  # fmt: skip

MUTANTS = (*NAME_MUTANTS,)
