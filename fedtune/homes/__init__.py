"""Homes on this machine: which of them pays for which records, and whether a home's ledger is still
there before it is opened."""
