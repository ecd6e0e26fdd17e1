"""The courier: the process of a site that has the network, with Flower, TLS and reconnecting. It
reads no record."""
