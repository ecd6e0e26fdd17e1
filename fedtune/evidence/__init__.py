"""Verify a run by reading its folder alone: the signatures of the coordinator and of every site,
and the logged steps from which ε is computed."""
