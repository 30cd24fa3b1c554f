"""How a process of the command line starts, without looking for garbage, and how it ends where nobody reads it."""

import gc
import os
import subprocess
import sys

import pytest

from tests.cli.conftest import Cli

_STARTED = """
import gc, sys
from studio.cli import main
from studio.commands import gpus
found = []
gpus.run = lambda args: found.append((gc.isenabled(), gc.get_freeze_count() > 10_000)) or 0
sys.argv = ["lora-studio", "gpus"]
print(main(), found)
"""


def test_a_process_looks_for_garbage_among_what_its_verb_makes_alone() -> None:
    done = subprocess.run([sys.executable, "-c", _STARTED], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["0", "[(True, True)]\n"]


def test_a_call_from_a_process_of_somebody_elses_freezes_nothing(cli: Cli) -> None:
    before = gc.get_freeze_count()
    assert cli("recipes").code == 0
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, before)


def test_a_recipe_that_is_called_like_a_verb_is_no_verb(cli: Cli) -> None:
    told = cli("--recipe", "demo", "recipes", "--json")
    assert told.code == 0, told.err


@pytest.mark.parametrize("words", [["recipes"], ["plan", "--model", "embedded", "--vram-gib", "8"]])
def test_a_reader_that_leaves_ends_it_quietly_as_a_broken_pipe_ends_tools(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "studio", *words], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + 13, "")
