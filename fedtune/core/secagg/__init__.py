"""Secure aggregation: keys, statements and masks with which only the sum of a round can be opened.

    statement.py   the statement that a ready site signs, and the checks of a set of such sites
    masks.py       pairwise masks: X25519, HKDF, AES-CTR, and how they cancel in the sum
    draw.py        a site's noised sum and its key, in memory until the sum was masked once

The coordinator's side (fedtune/server) adds up masked words and opens the sum; a site's
guarantee does not depend on it. Nothing here reads a record or uses Flower.
"""
