"""Three invented hospitals that triage notes to nine desks."""
