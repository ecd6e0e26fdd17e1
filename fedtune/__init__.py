"""fedtune: fine-tune a language model across hospitals without moving a record."""

import logging

from fedtune.boot import cut_off

__version__ = "0.1.0"

cut_off()

# Where the optional bitsandbytes is installed it warns at its import, by whoever imports it first,
# that a hub's code is missing, and at each int8 layer that it rounds, as it was asked to.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
