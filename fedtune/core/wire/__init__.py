"""Encode and sign everything that crosses the wire: arrays, keys, seals, receipts and requests."""
