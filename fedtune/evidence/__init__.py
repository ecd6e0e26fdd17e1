"""Verify a run from its folder alone. This covers the signatures of the coordinator and of every
site, and the logged steps from which ε is computed."""
