"""Compute what a study costs, and how much of its answers is noise, before it runs."""
