"""What every test process needs before any library is imported."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from studio.runs.calibration import calibration_path
from studio.runs.home import HOME_VARIABLE, cache_root
from tests.faults.table import Fault, lines_of, rows_of

# Two test processes share two cores: OpenMP threads that spin for each other would starve both.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A full collection walks every object there is, and most are of the libraries: their imports are not searched.
gc.disable()


def _home_of_its_own() -> None:
    """Keep what this user's runs taught the program out of the tests, and the tests out of it.

    Of the cache, what takes long to make is shared, such as the embedded model.
    """
    cache = cache_root()
    home = Path(tempfile.mkdtemp(prefix="lora-studio-tests-"))
    (home / "cache").mkdir()
    for name in ("models", "tools", "weight-sums"):
        (cache / name).mkdir(parents=True, exist_ok=True)
        (home / "cache" / name).symlink_to(cache / name, target_is_directory=True)
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ[HOME_VARIABLE] = str(home)


_home_of_its_own()

# A test either passes or fails, for everybody: the same examples each time. New ones are looked for on purpose, by
# `pytest --hypothesis-profile=explore`. No deadlines: how long an example takes says how busy the machine is.
settings.register_profile("same", deadline=None, derandomize=True, database=None, max_examples=100, print_blob=True)
settings.register_profile("explore", deadline=None, derandomize=False, max_examples=1000, print_blob=True)
settings.load_profile("same")


@pytest.fixture(scope="module", autouse=True)
def _nothing_learnt() -> None:
    """Forget what trainings of another file taught: estimates would differ by the order of the files."""
    calibration_path().unlink(missing_ok=True)


def pytest_collection_finish() -> None:
    """Set aside what all the imports have made, and look for garbage from here on."""
    gc.freeze()
    gc.enable()


_FAULTS: list[Fault] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the rows of the table of faults, from whichever process made them, and what could not be made."""
    if report.when == "teardown":
        _FAULTS.extend(rows_of(report.user_properties))
    elif report.skipped and "tests/faults/" in report.nodeid and isinstance(report.longrepr, tuple):
        _FAULTS.append(Fault(report.nodeid.partition("::")[2], "not made", count=0, ended=report.longrepr[2]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of faults."""
    if _FAULTS:
        terminalreporter.section("faults made for real")
        for line in lines_of(_FAULTS):
            terminalreporter.write_line(line)
