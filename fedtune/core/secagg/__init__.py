"""Secure aggregation: keys, statements and masks by which only a round's sum can be opened.

    statement.py   what a ready site signs, and the checks of the set that a round is opened for
    masks.py       pairwise masks: X25519, HKDF, AES-CTR, and how they cancel in the sum
    draw.py        a site's noised sum and its key, in memory until it was masked once

The coordinator's side, which adds up masked words and opens the sum, is no part of what a site's
guarantee needs (fedtune/server). Nothing here reads a record; nothing here knows Flower.
"""
