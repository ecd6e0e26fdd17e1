"""Verify from a run's folder alone, without having been there: signatures of the coordinator and
of every site, and the steps from which ε follows."""
