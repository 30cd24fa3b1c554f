"""Writes tiny checkpoints: `python -m tests.fakes.families FOLDER [NAME ...]`."""

import sys
from pathlib import Path

from tests.fakes.families import FAMILIES, make_family

for word in sys.argv[2:] or FAMILIES:
    make_family(Path(sys.argv[1]) / word, word)
