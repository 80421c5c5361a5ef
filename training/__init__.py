"""Train across machines: predict the memory, then measure it; ZeRO and FSDP opened up, and the real engines driven."""

import logging

# It warns of a package that nothing here needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
