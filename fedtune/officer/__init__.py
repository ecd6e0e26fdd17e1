"""What a person at a site does: review, accept, withdraw, let go, and look at the records."""
