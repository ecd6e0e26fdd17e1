"""Check a machine and its network before anything runs."""
