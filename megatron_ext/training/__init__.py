"""Training: state, one step, the loop.

Megatron-Core and torch warn, at import and at every save, of things that are chosen here on purpose
(no apex, torch's optimizer on a CPU): they are told to be quiet before the first import.
"""

import logging
import warnings

warnings.filterwarnings("ignore", module=r"(megatron\.core|torch)\b.*")
logging.getLogger("megatron.core").setLevel(logging.ERROR)
