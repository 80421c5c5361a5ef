"""Chapter `rag/`: find passages, read them, answer; and measure what each technique adds."""

import logging
import os
import warnings

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing here calls home
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's affair
# It warns of a package that nothing here needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
