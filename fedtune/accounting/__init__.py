"""What a study costs, and how much of its answers is noise, computed before it runs."""
