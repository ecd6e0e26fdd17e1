"""The courier: the process of a site that uses the network, through Flower and TLS. It reads no
record."""
