"""Three invented hospitals that triage notes to nine desks; the code is in fedtune/demo."""
