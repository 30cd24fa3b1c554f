"""How many cards the installed torch can use, without importing it here.

Only for machines on which NVML does not answer: a container without it, or a chip that has none.
"""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

_ASK = "import torch; print(torch.cuda.device_count())"
_ASK_SECONDS = 60.0


def torch_cards(python: str = sys.executable) -> int | None:
    """Return how many cards torch can use; None where it cannot be asked.

    A build for CPUs says so in its version; any other is asked in a process of its own, which takes seconds.

    Args:
        python: The interpreter that jobs run in.
    """
    try:
        if "+cpu" in version("torch"):
            return 0
        done = subprocess.run(
            [python, "-c", _ASK], stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_SECONDS, check=True
        )
        return int(done.stdout.split()[-1])
    except (PackageNotFoundError, OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
