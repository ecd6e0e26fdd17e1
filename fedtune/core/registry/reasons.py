"""Reduce the text of a refusal to the first of a list of phrases that it contains, for the log."""

from __future__ import annotations

from typing import Any

# fmt: off
# Of a reason, only the first of these phrases that it contains is logged.
PHRASES = (
    "policy.max_epsilon_per_study", "policy.max_epsilon", "policy.max_fallback_epsilon",
    "policy.max_delta", "of all its consortia together",
    "takes part in a plan once", "policy.hospital",
    "policy.peers", "vault.run",
    "policy.allow_privacy_off", "policy.allow_free_query", "which it did not when the site joined",
    "policy.allow_declared_data",
    "charged as private",
    "were declared public or",
    "what it declares of its data", "has no such declaration", "data.declared was changed",
    "columns.patient was changed",
    "has frozen its ledger", "policy.admission", "policy.min_noise_multiplier",
    "policy.min_units", "policy.max_grad_norm", "policy.max_sampling_rate", "policy.max_steps",
    "policy.max_rounds",
    "policy.max_rank", "policy.data_sheet", "study.data_sheet", "sheet lacks",
    "policy.modules", "policy.isolation", "policy.answers", "refused to let this answer go",
    "policy.objectives", "policy.strategies",
    "policy.modalities",
    "this site runs without --watch", "the plan has no [schedule]", "lifetime budget in this plan",
    "policy.bases", "policy.coordinators", "policy.release", "policy.teachers",
    "charges are all for the study's unit", "the cost of earlier rounds", "[hospital] was changed",
    "may be missing from this site's ledger",
    "the plan leaves training.rounds open",
    "nothing says that the teacher", "site.toml names no held-out records",
    "the plan has no query after round",
    "the self-test failed", "patient column", "lora.a_digest", 'privacy = "off"', "not in the plan",
    "lora.preconditioner.digest",
    "site.lora_rank", "its lora_rank is not one", "lora_rank changed",
    "the ledger was rolled back", "self-test", "does not know the plan",
    "it is not enrolled with this signing key, or was revoked",
    "the plan is not signed by the coordinator with which this site enrolled",
    "does not have the plan's base", "pays for more than", "no noise_multiplier up to",
    "ε of these steps cannot be computed",
    "too many studies are running at this site", "interrupted attempts included",
    "no answer in time", "the site is not connected", "the site could not load its app",
    "the site's app raised an error", "the site's app crashed", "the site's app failed",
    "the message was lost on the way", "the reply was lost on the way",
    "the message could not be sent", "another node's name", "declared_size changed",
    "signing key changed", "not signed by", "sealed for another", "header of its update",
    "its update is longer", "other noise than the plan's", "more steps than the plan has",
    "more kinds of steps", "no new noised step", "names another site", "step log is malformed",
    "other names or shapes", "plain fp32", "not as agreed", "not finite",
    "more than was asked for", "declared size does not fit",
    "its answer to the plan is malformed", "its answer is malformed",
    "its answer cannot be read", "not below 1 / site.declared_size",
    "of another kind than the request",
    "certificate has expired", "certificate is not yet valid", "certificate", "revoked",
    "rate limit", "too large", "counted already", "replay", "past the deadline", "quorum",
    "no more than a multiple of the median",
    "are pinned here", "the set of ready sites", "a statement of a ready site",
    "masked for another set", "no draw for this attempt", "its statement is about another draw",
    "it did not send its masked words", "the plan has no [secure_aggregation]",
    "only the sum of all sites is opened", "at a round, which is out of range",
    "stopped by SIGTERM", "stopped by SIGINT", "no reason given",
)
# fmt: on
OTHER = "other"
HELD = "policy.answers"  # in the reason of a site whose answer waits for a person there
WAITING = "waiting"  # a site's status while a person there has yet to sign or let an answer go


def reason_of(value: Any) -> str:
    """Shorten a refusal's reason for the log: return the first of PHRASES that the text `value`
    contains, "other" if it contains none, "" if it is empty. Errors: TypeError if `value` is no
    text."""
    if not isinstance(value, str):
        raise TypeError
    return next((phrase for phrase in PHRASES if phrase in value), OTHER) if value else ""
