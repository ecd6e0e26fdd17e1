"""Base models, adapters, and the network that one study trains."""
