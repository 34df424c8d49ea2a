"""megatron_ext: stable-then-decay mid-training, its branches and their RL, on Megatron-Core.

Megatron-Core and torch warn, at import and at every save, of things that are chosen here on purpose
(no apex, torch's optimizer on a CPU): they are told to be quiet before the first import.
"""

import logging
import warnings

__version__ = "0.1.0"

warnings.filterwarnings("ignore", module=r"(megatron\.core|torch)\b.*")
logging.getLogger("megatron.core").setLevel(logging.ERROR)
