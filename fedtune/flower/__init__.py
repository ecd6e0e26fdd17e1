"""Flower as fedtune uses it: in one process, under Ray, or across hospitals."""
