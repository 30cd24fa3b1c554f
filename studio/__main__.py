"""`python -m studio`, the same as `lora-studio`."""

import sys

from studio.cli import main

sys.exit(main())
