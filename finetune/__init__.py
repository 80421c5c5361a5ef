"""Chapter `finetune/`: adapt a language model, from a question in words to every weight."""

import logging

# It warns of a package that nothing here needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
