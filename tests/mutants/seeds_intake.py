"""Seeded bugs in where records come from, and in who agreed to their use."""

from __future__ import annotations

from tests.mutants.mutant import one

CONSENT, RECORDS, SITE = (
    "fedtune/data/consent.py",
    "fedtune/data/records.py",
    "fedtune/client/site.py",
)
T_CONSENT, T_PROPERTY = "tests/data/test_consent.py::", "tests/guarantee/test_property.py::"
T_PINNED = T_PROPERTY + "test_a_case_that_broke_the_guarantee_once[opts-out-by-a-"

MUTANTS = (
    one(
        "consent", "consent-after-the-filter", RECORDS,
        "    return with_consent(rows, file) if isinstance(file, SiteData) else rows\n",
        "    if isinstance(file, SiteData):\n"
        "        kept = file.kept_values\n"
        "        rows = (r for r in rows if isinstance(r[1], str) or _is_kept(r[1], kept))\n"
        "        return with_consent(rows, file)\n"
        "    return rows\n",
        T_CONSENT + "test_a_row_that_the_filter_leaves_out_still_speaks_for_its_patient",
        "a no that stands in a row which is selected away is not heard",
    ),
    one(
        "consent", "consent-of-a-row", CONSENT,
        "withheld = not yes or key in refused", "withheld = not yes",
        T_CONSENT + "test_one_row_that_does_not_say_yes_leaves_its_patient_out",
        "a patient who said no still trains with what was written before",
    ),
    one(
        "consent", "asked-once-a-study", SITE,
        "study.continuous or bool(data.consent)", "study.continuous",
        T_PINNED + "list]", "who opts out in mid-study trains to its end",
    ),
    one(
        "consent", "read-again-where-somebody-opted-out", RECORDS,
        "            if row is NO_CONSENT:\n",
        "            if withheld_in and row is not NO_CONSENT:\n"
        "                continue\n"
        "            if row is NO_CONSENT:\n",
        T_PINNED + "column]", "others' rows hang on whether somebody before them opted out",
    ),
    one(
        "consent", "a-list-for-everybody", CONSENT,
        "if path.stat().st_mode & OPEN:", "if False:",
        T_CONSENT + "test_a_list_that_others_may_read_is_refused",
        "whoever may read the list guesses who opted out",
    ),
    one(
        "consent", "the-nobody-on-the-list", CONSENT,
        "withheld = withheld or not key or has_opted_out(key)",
        "withheld = withheld or bool(key and has_opted_out(key))",
        T_CONSENT + "test_who_is_on_a_list_of_hashed_keys_is_left_out",
        "a record that may be anybody's is used where patients opted out",
    ),
    one(
        "consent", "a-receipt-for-anybody", "fedtune/client/withdraw.py",
        "if not verifies(ledger.key.public, _signed(receipt), signature):", "if not signature:",
        "tests/client/test_withdraw.py::test_a_changed_receipt_is_none",
        "a receipt that somebody wrote passes for the site's",
    ),
)  # fmt: skip
