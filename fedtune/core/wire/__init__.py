"""What crosses the wire is signed: keys, canonical bytes, seals and receipts."""
