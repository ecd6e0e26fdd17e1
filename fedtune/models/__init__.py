"""Base models, adapters, and the network that one study trains."""

import logging

# Where the optional bitsandbytes is installed it warns at its import that a hub's code is missing,
# and at each int8 layer that it rounds, as it was asked to.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
