"""The privacy ledger: a site's account of its charges. A charge is on disk before the round's
update is released."""
