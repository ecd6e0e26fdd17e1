"""What test_ledger.py and test_ledger_restore.py share."""

from __future__ import annotations

from pathlib import Path

CHAOS = Path(__file__).with_name("chaos.py")
