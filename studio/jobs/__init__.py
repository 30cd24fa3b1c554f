"""Child processes that do the heavy work. They never draw; they write a run directory."""

import logging
import warnings

# On some CPUs bitsandbytes says at import that an optional, faster 4-bit product "failed to load". Nothing has failed,
# and for the first minutes this would be all that a run's output shows.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# peft calls transformers 5 by an old name at every start. The warning would be the last line of a run that crashed, and
# would be taken for the cause.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
