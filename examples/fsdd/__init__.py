"""FSDD: recordings of ten digits by four speakers."""
