"""Bugs that show where a courier replays, reorders, forges, asks too early or kills the vault, and
not in what an honest one passes on: whole stories of a hostile one must see them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, one
from tests.mutants.places import ANSWERS, SITE

T = "tests/guarantee/test_hostile_courier.py::test_each_thing_that_a_courier_can_do"
# fmt: off
MUTANTS = (
    one(
        "courier", "an-open-charge-pays-again", "fedtune/core/ledger/ledger.py",
        '            self._ask(dataset, permit)\n            if permit_unknown:\n',
        "            self._ask(dataset, permit)\n"
        "            slot = charge.study, charge.round, adapter\n"
        "            for number, reserved in self._account.reserved.items():\n"
        "                if reserved.slot == slot and number not in self._account.done:\n"
        "                    return number\n"
        '            if permit_unknown:\n',
        f"{T}[killed-while-it-trains]",
        "a vault that is killed after its noise was drawn draws again at no charge",
    ),
    Mutant(
        "courier", "an-earlier-order-again-is-trained-for-nothing", SITE,
        (
            (
                "        payload = self.ledger.released(*slot)\n"
                "        if payload is None:\n"
                "            payload = self._train(prepared, round_, adapter, slot[2])\n",
                "        payload = self.ledger.released(*slot)\n"
                "        spent = [s.charge for s in self.ledger.spending(self._dataset)]\n"
                "        if any(c.study == digest and c.round > round_ for c in spent):\n"
                "            payload = self._train(prepared, round_, adapter, None)\n"
                "        elif payload is None:\n"
                "            payload = self._train(prepared, round_, adapter, slot[2])\n",
            ),
            (
                "        data, reserved = self.reserve(prepared, round_, adapter, digest)\n"
                "        recompute",
                "        data = self.data_in_study(study, prepared.network, self.site.data)\n"
                "        if digest is not None:\n"
                "            data, reserved = self.reserve(prepared, round_, adapter, digest)\n"
                "        recompute",
            ),
            (
                "        if plan:  # an update without noise is not stored; ordered again, it",
                "        if plan and digest is not None:  # an update without noise is not stored; "
                "ordered again, it",
            ),
        ),
        (f"{T}[asked-for-anything]",),
        "an order that comes after a later one is trained anew, and nobody pays",
    ),
    one(
        "courier", "an-order-too-early-counts-members", SITE,
        "self._prepared.get(digest)) is None:\n            raise build_unprepared()",
        "self._prepared.get(digest)) is None:\n"
        "            known = self.ledger.overlap(self._dataset, self._dataset)\n"
        '            raise type(build_unprepared())(f"this site does not know the plan; {known}")',
        f"{T}[asked-for-anything]",
        "whoever asks before a plan is sent learns how many records there are",
    ),
    one(
        "courier", "a-draw-has-its-rounds-key", "fedtune/core/vault/secure_round.py",
        "masks.new_key()",
        "masks.X25519PrivateKey.from_private_bytes("
        "bytes.fromhex(site.key.sign(str(draw).encode()))[:32])",
        f"{T}[killed-while-it-draws]",
        "a vault that is killed masks another sum with the key that it stated before",
    ),
    one(
        "courier", "orders-are-verified-until-one-was-paid", ANSWERS,
        "        check_order(order, site.coordinator_of(digest), beside, table)\n",
        "        try:\n"
        "            check_order(order, site.coordinator_of(digest), beside, table)\n"
        "        except SealError:\n"
        "            if not site.ledger.spending():\n"
        "                raise\n",
        f"{T}[asked-for-anything]",
        "once a study has begun, an order needs nobody's signature",
    ),
    one(
        "courier", "a-forgery-is-told-what-is-wrong-with-it", ANSWERS,
        '    except Refused as error:\n        return "refused", str(error)\n',
        '    except Refused as error:\n        return "refused", str(error)\n'
        '    except (KeyError, ValueError, TypeError) as error:\n'
        '        return "refused", describe(error)\n',
        f"{T}[asked-for-anything]",
        "a library's text about what it read leaves the site",
    ),
    one(
        "courier", "bytes-that-are-no-request-are-told-why", "fedtune/core/vault/process.py",
        "        return failure()\n    return answer_and_tell(place, request, tell)\n",
        '        return Answer("", {"status": "failed", "reason": str(error)})\n'
        "    return answer_and_tell(place, request, tell)\n",
        f"{T}[asked-for-anything]",
        "a vault argues with whoever sends it bytes",
    ),
)
