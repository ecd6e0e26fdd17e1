"""Bugs of the library: objects that are not what runs."""

from __future__ import annotations

from tests.mutants.mutant import one

SIMULATE, SITE = "fedtune/launch/simulate.py", "fedtune/core/vault/worker.py"
TEST = "tests/test_library.py::"

MUTANTS = (
    one(
        "library",
        "a-changed-site-runs-under-its-old-file",
        SIMULATE,
        "            if load_site(site.file) == site:\n",
        "            if load_site(site.file):\n",
        TEST + "test_a_site_that_was_changed_in_memory_is_what_counts",
        "a policy that was tightened in memory holds nowhere",
    ),
    one(
        "library",
        "one-ledger-for-two-sites",
        SIMULATE,
        "        if other := states.get(state):\n",
        "        if (other := None):\n",
        TEST + "test_two_sites_never_share_a_ledger",
        "what one site spends is charged to another's records",
    ),
    one(
        "library",
        "records-for-everybody-here",
        "fedtune/core/config/records.py",
        "replace(path, text.encode(), private=True)",
        "replace(path, text.encode())",
        TEST + "test_a_study_of_data_frames_from_memory_to_a_run",
        "whoever has a login on the machine reads the records",
    ),
    one(
        "library",
        "a-changed-copy-is-not-checked",
        "fedtune/core/config/load.py",
        "valid = Study.model_validate_json(study.model_dump_json())",
        "valid = study",
        TEST + "test_a_changed_copy_is_checked",
        "model_copy puts any value into a plan",
    ),
    one(
        "library",
        "the-first-coordinators-key-stays",
        SITE,
        "= replace(prepared, coordinator=coordinator)",
        "= prepared",
        TEST + "test_a_run_again_in_one_process_has_another_coordinator",
        "orders of a second run in one process are refused",
    ),
    one(
        "library",
        "a-site-as-it-was",
        SITE,
        "    if current and current.site != load_site(path):\n",
        "    if current and current.site is None:\n",
        TEST + "test_a_site_whose_file_changed_is_read_anew",
        "a second run in one process takes a site as it was at the first",
    ),
)
