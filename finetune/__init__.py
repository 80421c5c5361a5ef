"""Chapter `finetune/`: adapt a language model, from a question in words to every weight."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a package that nothing here needs
