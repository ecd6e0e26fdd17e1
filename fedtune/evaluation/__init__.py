"""Quality on public records."""
