"""The real command line with fake jobs: `python -m tests.fakes.cli VERB ...`."""

import sys

from studio.cli import main

FAKES = {
    "train": "tests.fakes.job",
    "merge": "tests.fakes.merge_job",
    "export": "tests.fakes.export_job",
    "chat": "tests.fakes.chat_job",
    "measure": "tests.fakes.measure_job",
    "audit": "tests.fakes.audit_job",
}

if __name__ == "__main__":
    sys.exit(main(modules=FAKES))
