"""What every test process needs before any library is imported."""

import os

# Two test processes share two cores: OpenMP threads that spin for each other would starve both.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
