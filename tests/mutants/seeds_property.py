"""Each repair of what was found around the core, taken out: the property itself must see it.

Most are bugs of `seeds_site`, which tests of their own kill; here the shipped worker lives through
a pinned case with and without one unit (tests/guarantee/property_world.py)."""

from __future__ import annotations

from dataclasses import replace

from tests.mutants import seeds_intake, seeds_procs, seeds_site
from tests.mutants.mutant import Mutant, one

ONCE = "tests/guarantee/test_property.py::test_a_case_that_broke_the_guarantee_once"
SEEN = {  # a bug, and the case that shows it
    "patients-share-the-caps-memory": "the-cap-knew-others",
    "a-teachers-refusal-is-everybodys": "too-long-for-the-teacher",
    "ranks-keep-the-first-records": "ranks-of-a-study-for-life",
    "a-full-disk-ends-the-pass": "a-disk-full-of-states",
    "a-receipt-counts-withdrawals": "receipts-of-two-others",
    "a-restart-is-a-first-start": "a-restart-after-a-new-row",
}
# fmt: off
MUTANTS = (
    *(
        replace(bug, name=f"{bug.name}-property", tests=(f"{ONCE}[{SEEN[bug.name]}]",))
        for bug in (*seeds_site.MUTANTS, *seeds_procs.MUTANTS, *seeds_intake.MUTANTS)
        if bug.name in SEEN
    ),
    *(
        replace(  # before the plan, and again under the ledger's lock
            bug, name=f"{bug.name}-property", tests=(f"{ONCE}[records-then-patients]",),
            edits=(*bug.edits, (
                "known = partial(check_known, self._dataset, study.unit, in_home=in_home)",
                "known = lambda *_: None",
            )),
        )
        for bug in seeds_site.MUTANTS if bug.name == "the-site-composes-what-it-does-not-know"
    ),
    Mutant(
        "ranks", "a-rank-reads-for-itself", "fedtune/core/vault/rank_process.py",
        (
            (
                "from fedtune.core.vault.worker import worker",
                "from fedtune.core.vault.worker import SiteWorker, worker",
            ),
            (
                'prepared.take(unpack_records(header["records"], tensors))',
                "prepared.take(SiteWorker(site).data_for("
                "prepared._study, prepared.network, site.data).dataset)",
            ),
        ),
        (f"{ONCE}[a-rank-ended-and-read-anew]",),
        "a row is another record in another process, by one that came meanwhile",
    ),
    Mutant(
        38, "a-draw-waits-in-the-folder", "fedtune/core/vault/secure_round.py",
        (
            (
                "    site.draws.keep(waiting)\n",
                "    site.draws.keep(waiting)\n"
                "    secret = key.private_bytes_raw()\n"
                "    whole = total, secret, stated.text(), reserved, waiting.events\n"
                '    (site.ledger.folder / "draw").write_bytes(pickle.dumps(whole))\n',
            ),
            ("import json\nimport logging\n", "import json\nimport logging\nimport pickle\n"),
            (
                "    waiting, study = site.draws.find(draw), prepared.study\n",
                "    waiting, study = site.draws.find(draw), prepared.study\n"
                '    file = site.ledger.folder / "draw"\n'
                "    if waiting is None and file.exists():\n"
                "        total, key, stated, *rest = pickle.loads(file.read_bytes())\n"
                "        secret = masks.X25519PrivateKey.from_private_bytes(key)\n"
                "        waiting = Waiting(total, secret, parse(stated), *rest)\n",
            ),
            (
                "    site.ledger.release(waiting.reservation, payload, keeps_all=site.keeps_all)\n",
                "    site.ledger.release(waiting.reservation, payload, keeps_all=site.keeps_all)\n"
                "    file.unlink(missing_ok=True)\n",
            ),
        ),
        (f"{ONCE}[a-folder-put-back]",),
        "a draw lies on disk: a folder that was put back masks it for a second set of sites",
    ),
    Mutant(
        "resources", "members-come-before-charges", "fedtune/core/vault/worker.py",
        (
            (
                "return self.room.give_up()",
                "return __import__('contextlib').nullcontext()",
            ),
            (
                "self.ledger.declare(*about, members, data.cohort, arrivals,",
                "self.ledger.declare(*about, dataset.members, data.cohort, arrivals,",
            ),
            ("isinstance(error, LedgerError) and not isinstance(error, NoRoom)",
             "isinstance(error, LedgerError)"),
        ),
        (
            "tests/guarantee/test_property.py::"
            "test_a_disk_without_room_for_members_or_an_update[]",
        ),
        "whether a round can be charged follows from how many records there are",
    ),
    one(
        "resources", "an-update-without-room-fails-the-round", "fedtune/core/ledger/ledger.py",
        "        if self._room is None or self._room.has_space(len(update)):\n            try:\n"
        "                replace(path, update, private=True)\n"
        "                self._unstored.pop(slot[0], None)\n                return\n"
        "            except InfrastructureError as error:\n"
        '                log.warning("%s", error)\n',
        "        replace(path, update, private=True)\n        return\n",
        "tests/dp/test_ledger.py::test_an_update_without_room_is_kept_in_memory_and_sent",
        "an answer is there or not by what fills the disk",
    ),
    one(
        31, "arrival-by-the-first-note", "fedtune/core/data/load.py",
        "keys = tuple(map(member, units))",
        'keys = tuple(b"record\\0" + content_of(units[key].records[0]) for key in units)',
        f"{ONCE}[a-newcomer-was-there-before]",
        "a new patient with a note that another had already counts as present from the start",
    ),
    one(
        32, "a-file-without-a-column-is-everybodys", "fedtune/core/data/files.py",
        "    if strict:\n        names.require()\n",
        "        own = Names(where, keys)\n"
        "        list(readers[path.suffix.lower()].rows(path, own))\n"
        "        own.require()\n",
        f"{ONCE}[a-file-of-ones-own-jsonl]",
        "one patient's file switches the site to noise",
    ),
    Mutant(
        36, "a-text-decides-what-is-composed", "fedtune/core/ledger/ledger.py",
        (
            (
                "            if arrival:\n                writer.append(",
                "            for other in self._account.declared:\n"
                "                if other != dataset and writer.overlap(dataset, other):\n"
                "                    pair = frozenset((dataset, other))\n"
                "                    self._account.apart_since.pop(pair, None)\n"
                "            if arrival:\n                writer.append(",
            ),
        ),
        (f"{ONCE}[a-text-in-two-datasets]",),
        "an answer turns from admitted to refused with one sentence",
    ),
)
