"""Base models, adapters, and the network that one study trains."""

import logging

# Said once per process where the optional bitsandbytes is installed; it asks for code from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
