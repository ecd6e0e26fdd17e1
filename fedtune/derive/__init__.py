"""Models made of finished runs, after their ε was paid."""
