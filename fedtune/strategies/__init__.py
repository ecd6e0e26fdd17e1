"""Aggregation strategies of this release, one module each; core/strategy.py defines their
interface."""
