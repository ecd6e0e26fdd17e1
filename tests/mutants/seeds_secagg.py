"""Seeded bugs of secure aggregation: who is in a set, what is masked how often, what it costs."""

from __future__ import annotations

from tests.mutants.mutant import Mutant
from tests.mutants.mutant import one as _one
from tests.mutants.places import BUDGET, PLAN, SITE

STATEMENT, MASKS = "fedtune/core/secagg/statement.py", "fedtune/core/secagg/masks.py"
DRAWS, AT_SITE = "fedtune/core/secagg/draw.py", "fedtune/core/vault/secure_round.py"
AT_COORDINATOR, ENTRIES = "fedtune/server/secure_round.py", "fedtune/core/ledger/entries.py"
T_ATTACKS, T_MASKS = "tests/secagg/test_attacks.py::", "tests/secagg/test_masks.py::"
EARLIER = T_ATTACKS + "test_a_statement_of_an_earlier_attempt_is_of_another_draw"
SYBILS = T_ATTACKS + "test_sybils_of_the_coordinator_count_for_nothing"
AREA = "shared noise"

MUTANTS: tuple[Mutant, ...] = (
    _one(
        AREA, "noise-is-shared-with-keys-that-nobody-compared", "fedtune/core/vault/policy.py",
        "    yield from _about_peers(study, policy)\n", "",
        "tests/secagg/test_both_epsilons.py::test_a_sites_own_key_is_none_of_its_peers",
        "the policy admits a plan whose other sites may be the coordinator's own",
    ),
    _one(
        AREA, "whoever-is-in-the-set-counts", STATEMENT,
        "known = len({*signing} & {*pinned, own})", "known = len({*signing})",
        SYBILS, "a set may consist of sites that the coordinator enrolled for itself",
    ),
    _one(
        AREA, "any-number-of-strangers-is-masked-for", STATEMENT,
        "    check_work(signing, mine.signing, pinned, numbers)\n", "",
        T_ATTACKS + "test_sites_that_nobody_pinned_cost_a_site_no_more_than_a_bound",
        "one order that names 10,000 made-up sites keeps a site busy for most of an hour",
    ),
    _one(
        AREA, "strangers-are-counted-after-the-charge", "fedtune/core/vault/secure_round.py",
        "        check_work(asked, site.key.public, pinned, _numbers_of(prepared))\n", "",
        T_ATTACKS + "test_sites_that_nobody_pinned_cost_a_site_no_more_than_a_bound",
        "an attempt that will be void is paid for",
    ),
    _one(
        AREA, "no-pin-is-asked-for", STATEMENT, "    if known < at_least:", "    if known < 0:",
        T_ATTACKS + "test_too_few_pinned_sites_are_refused_before_anything_is_charged",
        "a site takes part in a set in which it has pinned nobody",
    ),
    _one(
        AREA, "an-attempt-has-no-name", STATEMENT,
        'return f"{self.adapter}:{self.attempt}"', "return self.adapter",
        T_ATTACKS + "test_an_attempt_that_was_masked_is_no_answer_to_the_next",
        "the second attempt is the first one's draw",
    ),
    _one(
        AREA, "a-statement-of-any-draw-will-do", STATEMENT,
        "if any(ready.draw != mine.draw for ready in statements):", "if False:",
        EARLIER, "a statement of an earlier draw is accepted again",
    ),
    _one(
        AREA, "a-peer-adds-what-it-likes", STATEMENT,
        "if any(ready.noise != mine.noise for ready in statements):", "if False:",
        T_ATTACKS + "test_a_peer_of_other_noise_is_no_part_of_the_sum",
        "ε is stated for noise that a peer did not add",
    ),
    _one(
        AREA, "a-name-may-be-in-the-set-twice", STATEMENT,
        "if len({getattr(ready, field) for ready in statements}) < len(statements):", "if False:",
        T_ATTACKS + "test_whoever_is_in_the_set_twice_voids_it",
        "one site is in a set twice, with two masks",
    ),
    _one(
        AREA, "colluders-share-the-noise", PLAN,
        "return shared_noise.own_sigma(self.noise_multiplier, self.sites - self.colluding)",
        "return shared_noise.own_sigma(self.noise_multiplier, self.sites)",
        T_ATTACKS + "test_a_site_that_adds_no_noise_is_noticed_by_nobody_and_t_counts_it",
        "each site adds σ/√n in place of σ/√(n − t)",
    ),
    _one(
        38, "sent-again-for-another-set", AT_SITE,
        'if metadata_of(answered)["set"] != set_digest(asked):', "if False:",
        T_ATTACKS + "test_a_site_whose_message_is_dropped_is_not_told_apart_by_asking_again",
        "one draw in two sums",
    ),
    _one(
        AREA, "the-key-is-kept", DRAWS, "                del self._waiting[draw]\n",
        "                pass\n",
        T_ATTACKS + "test_ready_and_masked_answer_again_with_the_same_bytes",
        "what was sent can be unmasked later",
    ),
    _one(
        AREA, "a-draw-is-written-down", AT_SITE, "    site.draws.keep(waiting)\n",
        "    site.draws.keep(waiting)\n"
        "    secret = key.private_bytes_raw() + total.tobytes()\n"
        '    (site.ledger.folder / "draw").write_bytes(secret)\n',
        T_ATTACKS + "test_a_folder_put_back_masks_no_draw_a_second_time",
        "a snapshot of the folder brings one draw back for another set",
    ),
    _one(
        AREA, "old-draws-stay-on-disk", DRAWS, "            path.unlink(missing_ok=True)\n",
        "            pass\n",
        T_ATTACKS + "test_draws_that_an_earlier_release_kept_on_disk_are_removed",
        "the keys that an earlier release wrote outlive the upgrade",
    ),
    _one(
        AREA, "a-void-attempt-costs-nothing", "fedtune/accounting/costs.py",
        "steps = of_site.steps + more * of_site.local_steps", "steps = of_site.steps",
        "tests/secagg/test_both_epsilons.py::"
        "test_a_plan_says_what_attempts_that_come_to_nothing_cost",
        "a plan promises what a restart breaks",
    ),
    _one(
        AREA, "one-key-for-all-draws", MASKS, "return X25519PrivateKey.generate()",
        "return X25519PrivateKey.from_private_bytes(bytes(range(32)))",
        EARLIER, "the same mask on two sums",
    ),
    _one(
        AREA, "a-site-clamps", MASKS, "words = total.astype(np.uint64)",
        "words = np.clip(total, -(2**31), 2**31 - 1).astype(np.uint64)",
        T_MASKS + "test_a_sum_beyond_the_words_wraps_and_is_not_clamped",
        "an answer about one site's sum with its own noise alone",
    ),
    _one(
        AREA, "a-point-of-low-order-is-taken", STATEMENT,
        "    if not _gives_a_secret(ready.masking):", "    if False:",
        T_ATTACKS + "test_a_masking_key_of_low_order_costs_nobody_an_attempt",
        "one liar voids every attempt",
    ),
    _one(
        AREA, "a-mask-knows-no-set", MASKS, "salt=bytes.fromhex(digest)", "salt=None",
        T_MASKS + "test_a_set_with_another_member_has_other_masks", "masks of two sets cancel",
    ),
    _one(
        AREA, "the-mask-ends-early", MASKS, "_keystream(derived, len(words), bits)",
        "_keystream(derived, min(len(words), _CHUNK), bits)",
        T_MASKS + "test_one_message_and_all_but_one_are_uniform[zero-32]",
        "the rest of the sum is there to read",
    ),
    _one(
        AREA, "the-fallback-costs-nothing", ENTRIES,
        "return Steps(self.noise_multiplier, self.sampling_rate, self.steps, self.records)",
        "sigma = joint_sigma(self.noise_multiplier, self.sites - self.colluding)\n"
        "        return Steps(sigma, self.sampling_rate, self.steps, self.records)",
        "tests/secagg/test_model.py::test_nothing_happens",
        "the ledger computes the fallback ε as if the other sites' noise were sure to be there",
    ),
    _one(
        AREA, "the-fallback-has-no-ceiling", BUDGET,
        "if share.is_shared and", "if False and",
        T_ATTACKS + "test_a_ceiling_for_the_fallback_holds",
        "policy.max_fallback_epsilon is never applied",
    ),
    _one(
        AREA, "one-site-may-be-asked-alone", SITE,
        "(prepared := self.begin(digest, round_, receipt)).study.secure_aggregation:",
        "(prepared := self.begin(digest, round_, receipt)).study.secure_aggregation == 1:",
        T_ATTACKS + "test_no_update_of_one_site_is_sent_in_such_a_study",
        "one site's update, with a share of the noise",
    ),
    _one(
        AREA, "the-coordinator-takes-any-statement", AT_COORDINATOR,
        "if (ready.draw, ready.site, ready.size, ready.signing) != expected:", "if False:",
        T_ATTACKS + "test_the_coordinator_takes_no_statement_but_of_this_draw",
        "one liar voids every attempt",
    ),
    _one(
        AREA, "an-old-message-voids-an-attempt", AT_COORDINATOR,
        'startswith(("void", "refused"))', 'startswith(("void", "refused", "dropped"))',
        T_ATTACKS + "test_a_reply_that_is_dropped_is_asked_for_again", "every site pays again",
    ),
    _one(
        AREA, "a-study-ends-and-its-keys-stay", SITE,
        "        self.draws.destroy(digest)  #", "        #",
        T_ATTACKS + "test_a_finished_study_leaves_no_key", "what was given up can be masked",
    ),
    _one(
        AREA, "a-spoiled-sum-is-opened-again", AT_COORDINATOR,
        '        self._begin(number, self.progress.attempt["number"] + 1)'
        "  # so that --resume draws anew\n        self.save()\n", "",
        T_ATTACKS + "test_garbled_words_stop_the_run_and_the_next_attempt_is_a_new_draw",
        "the run can never go on",
    ),
)  # fmt: skip
