"""The privacy ledger: a site's charges, each of which is on disk before anything is released for
it."""
