"""A process that encodes rows for another one: `python -P -m studio.jobs.base.data.encode_worker`.

It reads frames from stdin: an encoder, then chunks of stored rows. To each chunk it answers on stdout with what became
of it. It ends when the other end is closed, so that none is left over when a run is killed. It ignores Ctrl-C, which
the terminal sends to all processes: who started it decides.
"""

import os
import pickle
import signal
import sys

from studio.jobs.base.torchless import hide_torch


def main() -> None:
    """Encode until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    hide_torch()
    from studio.jobs.base.data.encode_pool import answer, read_frame, write_frame  # noqa: PLC0415  it imports transformers

    begin = read_frame(sys.stdin.buffer)
    if begin is None:
        return
    encoder, method = pickle.loads(begin)  # noqa: S301  from the process that has started this one
    while (lines := read_frame(sys.stdin.buffer)) is not None:
        try:
            write_frame(out, pickle.dumps(answer(encoder, method, lines), pickle.HIGHEST_PROTOCOL))
        except BrokenPipeError:
            os._exit(0)  # the other end is gone; nothing is left to flush


if __name__ == "__main__":
    main()
