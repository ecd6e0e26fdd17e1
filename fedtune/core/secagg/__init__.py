"""Secure aggregation: keys, statements and masks with which only a round's sum can be opened.

    statement.py   what a ready site signs, and the checks of the set that a round is opened for
    masks.py       pairwise masks: X25519, HKDF, AES-CTR, and how they cancel in the sum
    draw.py        a site's noised sum and its key, in memory until it was masked once

The coordinator's side (fedtune/server) adds up masked words and opens the sum; a site's
guarantee does not depend on it. Nothing here reads a record or uses Flower.
"""
