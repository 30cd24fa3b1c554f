"""Child processes that do the heavy work. They never draw; they write a run directory."""

import logging
import warnings

# On some CPUs bitsandbytes says at import that an optional, faster 4-bit product "failed to load": nothing has failed,
# and for minutes it would be all that a run's log shows.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# peft asks transformers 5 under an old name at every start: under a run that crashed it would stand as its last lines.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
