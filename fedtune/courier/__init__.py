"""A site's half that speaks to the network: Flower, TLS, reconnecting. It holds no record."""
