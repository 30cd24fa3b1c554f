"""A new field of a recipe is one declaration: flag, help, reference, form, checks and files follow from it.

What a commit would add to `studio/core/recipe.py` is put in here, in an interpreter of its own; the second file of such
a commit is the one that heeds the field, and `tests/jobs/test_every_field.py` then asks for a row.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

DECLARED = """
    warmth: float = declared(
        0.5,
        Number(float, 0, 2, "degrees", (0, 0.5, 1, 2)),
        "Warmth",
        "How warm the toy is.",
        cost="Costs wool.",
        flag="warmth",
        resume="free",
    )
"""
SCRIPT = """
import contextlib, importlib.util, io, json, sys

source, added = json.loads(sys.argv[1])
spec = importlib.util.spec_from_file_location("studio.core.recipe", source)
module = importlib.util.module_from_spec(spec)
sys.modules["studio.core.recipe"] = module
text = open(source, encoding="utf-8").read()
before, found, after = text.partition("    lora_plus_ratio: float = declared(")
assert found
exec(compile(before + added.lstrip("\\n") + found + after, source, "exec"), module.__dict__)

from studio.cli import main
from studio.core.errors import BadInput
from studio.probe.resume import recipe_changes
from studio.core.recipe import Recipe
from studio.core.recipe_parse import apply_settings, recipe_from_dict
from studio.runs.recipe_file import dump_recipe
from studio.tui.panels.field_help import field_help_text
from studio.tui.panels.recipe_form import RecipeForm
from studio.tui.screens.help import help_text


def printed(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        main(list(words))
    return out.getvalue()


def refused(word):
    try:
        apply_settings(Recipe(), [word])
    except BadInput as error:
        return str(error)


set_to_1 = apply_settings(Recipe(), ["adapter.warmth=1"])
form = RecipeForm(set_to_1).advanced_rows()
json.dump({
    "default": Recipe().adapter.warmth,
    "flag": printed("plan", "--help"),
    "too warm": printed("plan", "--model", "embedded", "--warmth", "3", "--vram-gib", "8"),
    "refused": [refused("adapter.warmth=3"), refused("adapter.warmht=1"), refused("adapter.warmth=hot")],
    "reference": printed("recipes", "--fields"),
    "toml": dump_recipe(set_to_1),
    "again": recipe_from_dict(set_to_1.to_dict()) == set_to_1,
    "form": [[type(row).__name__, row.value] for row in form if row.id == "adapter--warmth"],
    "advice": field_help_text("adapter.warmth", (), "").plain,
    "help": help_text((), fields=True).plain,
    "resume": recipe_changes(Recipe().to_dict(), set_to_1),
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What the program says once the field is declared."""
    from studio.core import recipe

    words = json.dumps([recipe.__file__, DECLARED])
    done = subprocess.run([sys.executable, "-c", SCRIPT, words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_declared_field_is_read_checked_and_written(told: dict[str, Any]) -> None:
    assert told["default"] == 0.5
    assert "adapter.warmth: found 3.0; wanted 0 to 2 degrees" in told["refused"][0]
    assert "perhaps adapter.warmth" in told["refused"][1]
    assert "adapter.warmth: found 'hot'" in told["refused"][2]
    assert "warmth = 1.0\n" in told["toml"]
    assert told["again"] is True
    assert told["resume"] == [[], []], "the field is free to change when a run goes on"


def test_a_declared_field_has_its_flag_and_its_row_in_the_reference(told: dict[str, Any]) -> None:
    assert "--warmth N" in told["flag"]
    assert "How warm the toy is. 0 to 2 degrees." in " ".join(told["flag"].split())
    assert "adapter.warmth: found 3.0; wanted 0 to 2 degrees" in told["too warm"]
    row = "| `adapter.warmth` `--warmth` | 0.5 | 0 to 2 degrees | How warm the toy is. Costs wool. |"
    assert row in told["reference"]


def test_a_declared_field_is_on_the_form_and_explained_beside_it(told: dict[str, Any]) -> None:
    assert told["form"] == [["Slider", 1.0]]
    assert "How warm the toy is.\nCosts wool.\n0 to 2 degrees." in told["advice"]
    assert "Warmth  adapter.warmth, 0 to 2 degrees" in told["help"]
