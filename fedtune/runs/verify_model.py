"""Compute the digest of a base or a run that a person names, and verify a run's signature.

A site's process loads models by digest (core/models/loaded.py) and verifies no signature. The
signature is verified here, when a person names a model in a command."""

from __future__ import annotations

from fedtune.core.bases import known_here
from fedtune.core.bases.find import cache_dir, place_of
from fedtune.core.bases.find import verify as verify_base
from fedtune.core.models.adapter_files import load_adapter
from fedtune.core.models.loaded import PLAN, digest_of
from fedtune.core.run_folder import ADAPTER, load_plan
from fedtune.evidence.verify import check_signed


def verify(source: str) -> tuple[str, str]:
    """Verify a base or a run on this machine, and return its name and its digest; nothing is
    fetched.

    source: the name or folder of a base, or the folder of a run. Errors: ModelError; ConfigError
    (plan.json is damaged); NotGenuine (the run was changed after it was signed)."""
    run = place_of(source)
    if not (run / PLAN).is_file():
        base = verify_base(source)
        return base.name, base.digest
    check_signed(run)
    study = load_plan(run)
    arrays = load_adapter(run / ADAPTER)
    actual_digest = digest_of(verify_base(study.base.model), study, arrays)
    known_here.note(cache_dir(), actual_digest, run.name, run)
    return study.study.name, actual_digest
