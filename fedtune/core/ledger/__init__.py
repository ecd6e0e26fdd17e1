"""The privacy ledger: what a site has spent, on disk before anything is released."""
