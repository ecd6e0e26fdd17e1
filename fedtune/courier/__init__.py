"""The half of a site that talks to the network: Flower, TLS and reconnecting. It holds no
record."""
