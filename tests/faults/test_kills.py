"""Workers that are killed outright at random moments: each run comes back to the same numbers."""

import random
import time
from collections.abc import Callable

import pytest

from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from tests.faults.conftest import CONFIGURATIONS, KILLS, SECONDS, SEED, Kit, Outcome, shown, slug
from tests.faults.table import Fault

pytestmark = pytest.mark.slow
Begin = Callable[..., Fault]
_FILES = 60
"""A run of eight steps changes about as many files in its folder."""


def _kill_at(kit: Kit, paths: RunPaths, chance: random.Random, seconds: float, row: Fault) -> bool:
    """Kill a worker at a random moment; return whether it was still there."""
    if chance.random() < 0.5:
        moment = chance.random() * seconds
        process = kit.start(paths)
        time.sleep(moment)
        where = f"{moment:.2f} s"
    else:
        number = chance.randrange(1, _FILES)
        process = kit.start(paths, hold=f"file:{number}")
        while not process.held and process.poll() is None:
            time.sleep(0.005)
        where = f"file {number}"
    if process.poll() is not None:
        return False
    process.kill()
    began = time.monotonic()
    process.wait()
    if run_status(paths) is Status.finished:  # between its last line and its end
        return False
    shown(row, paths, Status.crashed, began)
    row.made += f"{', ' if row.count else ''}{where}"
    row.count += 1
    return True


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_killed_at_random_moments_a_run_equals_one_that_was_not(kit: Kit, fault: Begin, kind: str) -> None:
    """Killed runs are resumed and killed again; each that comes to its end is compared, and the next one begins."""
    place = list(CONFIGURATIONS).index(kind)
    wanted = KILLS * (place + 1) // len(CONFIGURATIONS) - KILLS * place // len(CONFIGURATIONS)
    chance = random.Random(f"{SEED} {kind}")  # noqa: S311  moments, not secrets
    row = fault(f"kill -9, {kind}", f"at random (seed {SEED}): ", count=0)
    whole = kit.whole(kind)
    recipe = kit.recipe(kind)
    paths, runs = kit.new(recipe, name=slug(kind)), 0
    while row.count < wanted:
        if not _kill_at(kit, paths, chance, SECONDS[kind], row) and run_status(paths) is Status.finished:
            runs += _equals(paths, whole)
            paths = kit.new(recipe, name=slug(kind))
    if run_status(paths) is not Status.finished:
        kit.finish(paths)
    runs += _equals(paths, whole)
    row.others = kit.kept()
    row.ended = f"{runs} resumed, equal to the uninterrupted run"


def _equals(paths: RunPaths, whole: Outcome) -> int:
    assert vars(Outcome(paths)) | {"folder": 0} == vars(whole) | {"folder": 0}
    return 1
