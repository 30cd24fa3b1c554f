"""Each shipped recipe's head comment: its figures are today's plan, and the cards that it names hold the run."""

import re

import pytest

from studio.core.gpu_catalogue import find_gpu
from studio.runs.recipe_file import load_recipe, shipped_recipes
from tests.cli.conftest import Cli

GIB = 2**30
PEAK = re.compile(
    r"# Peak: predicted ([0-9.]+) GiB on the card \(([0-9.]+) to ([0-9.]+)\) by `lora-studio plan`; "
    r"not yet run on hardware\.$",
    re.MULTILINE,
)
CARD = re.compile(r"# Card: ([0-9]+) GB \(([^)]+)\)", re.MULTILINE)
NAMED = sorted(set(shipped_recipes()) - {"demo"})


@pytest.mark.parametrize("name", NAMED)
def test_the_head_comment_tells_todays_plan_and_the_cards_hold_it(cli: Cli, name: str) -> None:
    text = shipped_recipes()[name].read_text("utf-8")
    assert load_recipe(shipped_recipes()[name]).name == name
    (told,), ((size, cards),) = PEAK.findall(text), CARD.findall(text)
    assert name.endswith(f"-{size}gb")
    for card in cards.split(", "):
        total = find_gpu(card).total_bytes / GIB
        assert float(size) * 0.93 < total < float(size) * 1.05, f"{card} is no card of {size} GB"
        plan = cli("plan", name, "--gpu", card, "--json").document
        assert plan["ranges"]["device"]["high"] <= plan["budget_bytes"]
        assert plan["verdict"] == "fits"
        assert told == tuple(f"{plan['ranges']['device'][end] / GIB:.1f}" for end in ("expected", "low", "high"))


def test_there_are_recipes_for_cards_of_each_usual_size() -> None:
    sizes = {re.sub(r".*-([0-9]+)gb$", r"\1", name) for name in NAMED}
    assert sizes >= {"8", "12", "16", "24", "32"}
