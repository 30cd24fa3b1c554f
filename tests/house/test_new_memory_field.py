"""A new field with a memory cost: its declaration, the same name in the estimator's set-up, a line that prices it.

What a commit would add to these three files is put in here, in an interpreter of its own. The fourth file of such a
commit is the one that heeds the field (`tests/jobs/test_every_field.py`).
"""

import json
import subprocess
import sys
from typing import Any

import pytest

MIB = 2**20
ADDED = {
    "studio.core.recipe": (
        "    lora_plus_ratio: float = declared(",
        """
    ballast_mib: int = declared(
        0,
        Number(int, 0, 10_000, "MiB", (0, 100, 1000)),
        "Ballast",
        "What the toy weighs.",
        cost="Memory, all of it.",
        flag="ballast",
        resume="free",
    )
""",
    ),
    "studio.core.vram.setup": ("    gpus: int = 1\n", "    ballast_mib: int = 0\n"),
    "studio.core.vram.stages": ("    state = optimizer_bytes(", "    base += kind.ballast_mib * MIB\n"),
}
SCRIPT = """
import contextlib, importlib.util, io, json, sys

for name, (place, added) in json.loads(sys.argv[1]).items():
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    text = open(spec.origin, encoding="utf-8").read()
    before, found, after = text.partition(place)
    assert found, name
    exec(compile(before + added.lstrip("\\n") + found + after, spec.origin, "exec"), module.__dict__)

from studio.cli import main
from studio.core.gpu_catalogue import find_gpu
from studio.core.recipe import Recipe
from studio.probe.plan import device_from_catalogue
from studio.probe.shape import find_shape
from studio.probe.forecast import Forecaster
from studio.tui.reading import reading_of


def plan(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["plan", "--model", "embedded", "--vram-gib", "8", "--json", *words])
    return json.loads(out.getvalue())


forecaster = Forecaster(find_shape("embedded", ""), device_from_catalogue(find_gpu("RTX 4090")))
outlooks = [forecaster.outlook(Recipe().with_("adapter.ballast_mib", size)) for size in (0, 500)]
json.dump({
    "without": plan(),
    "with": plan("--ballast", "100"),
    "too much": plan("--set", "adapter.ballast_mib=9000"),
    "peaks": [outlook.estimate.allocated.expected for outlook in outlooks],
    "gauge": [sum(part.value for part in reading_of(outlook).parts) for outlook in outlooks],
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What the program says once the field is declared, taken into the set-up and priced."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(ADDED)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_plan_counts_it_and_says_it(told: dict[str, Any]) -> None:
    before, after = told["without"], told["with"]
    assert after["components"]["base"] - before["components"]["base"] == 100 * MIB
    assert after["peak_bytes"] - before["peak_bytes"] == 100 * MIB
    assert (before["setup"]["ballast_mib"], after["setup"]["ballast_mib"]) == (0, 100)
    assert (before["fits"], told["too much"]["fits"]) == (True, False)


def test_the_gauge_follows_it(told: dict[str, Any]) -> None:
    assert told["peaks"][1] - told["peaks"][0] == 500 * MIB
    assert told["gauge"][1] - told["gauge"][0] == pytest.approx(500 / 1024, abs=0.01)
