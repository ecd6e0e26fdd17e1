"""Aggregation strategies of this release, one module each; core/strategy.py says what one is."""
