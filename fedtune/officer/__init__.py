"""Carry out the tasks of a person at a site: review plans, accept models, withdraw consent, release
answers, and inspect records."""
