"""Flower as fedtune uses it: in one process, in several, or across hospitals."""
