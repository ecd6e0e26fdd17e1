"""Names of the files in a site's state folder that the site's people read or delete."""

from __future__ import annotations

COUNTS = "counts.json"  # of each dataset, what became of its rows (core/vault/reading.py)
# What the site decided about models (officer/acceptance): in this folder, one for each decision.
ACCEPTANCE = "acceptance"
RECORD = "record.json"
FIGURES = "figures.json"
PAGE = "page.html"
LOSSES = "losses.jsonl"  # the site's own loss by round (core/vault/own_loss.py)
