"""Train across machines: predict the memory, then measure it; ZeRO and FSDP opened up, and the real engines driven."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a package that nothing here needs
