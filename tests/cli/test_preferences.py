"""What the verbs say of runs that learn from pairs of answers, and of their plans."""

from pathlib import Path
from typing import Any

from studio.core.events import Evaluated, Finished, Started, StepDone
from studio.core.recipe import Recipe
from studio.runs.layout import RunPaths
from tests.cli.conftest import Cli
from tests.fakes.runs import make_run, write_log

FIGURES = {"chosen_reward": 0.4, "rejected_reward": -0.1}


def run_of(home: Path, objective: str) -> RunPaths:
    """A run with two steps and two evaluations, of pairs unless it is supervised."""
    paths = make_run(home, objective, Recipe().with_("train.objective", objective))

    def figures(margin: float, accuracy: float) -> dict[str, Any]:
        if objective == "sft":
            return {}
        return {"margin": margin, "accuracy": accuracy, "chosen_logp": -9.0, "rejected_logp": -12.0, **FIGURES}

    def step(number: int, loss: float) -> StepDone:
        return StepDone(
            at=70.0, step=number, loss=loss, learning_rate=1.0, grad_norm=1.0, tokens=9, seconds=2.0,
            **figures(number / 4, number / 4),
        )  # fmt: skip

    write_log(
        paths,
        Started(at=10.0, job="train", method="lora", recipe={"train": {"objective": objective}}),
        Evaluated(at=11.0, step=0, loss=0.7, loss_tokens=20, rows=20, seconds=1.0, **figures(0.0, 0.0)),
        step(1, 0.6),
        step(2, 0.5),
        Evaluated(
            at=71.0, step=2, loss=0.55, loss_tokens=20, rows=20, seconds=1.0, **figures(0.5, 0.75),
            gain={"value": -0.15, "low": -0.2, "high": -0.1},
        ),
        Finished(at=72.0, outcome="done", step=2, seconds=2.0),
    )  # fmt: skip
    return paths


def test_a_run_shows_the_figures_of_its_pairs(cli: Cli, home: Path) -> None:
    paths = run_of(home, "dpo")
    said = cli("runs", "show", paths.name).out
    assert "pairs      at the last step: the chosen answer is preferred in 50% of the pairs, margin +0.500" in said
    assert "before     held out, at first: neither answer is preferred yet, margin +0.000" in said
    assert "log-probability chosen -9.00, rejected -12.00" in said
    assert "the held-out loss improved: lower by 0.1500" in said, "20 pairs are enough, though they are no 100 tokens"
    document = cli("runs", "show", paths.name, "--json").document
    assert document["objective"] == "dpo"
    assert document["pairs"]["last_step"]["margin"] == 0.5
    assert document["pairs"]["last_evaluation"]["accuracy"] == 0.75
    assert document["evals"][1]["chosen_reward"] == 0.4


def test_a_supervised_run_shows_none(cli: Cli, home: Path) -> None:
    paths = run_of(home, "sft")
    assert "pairs" not in cli("runs", "show", paths.name).out
    document = cli("runs", "show", paths.name, "--json").document
    assert (document["objective"], document["pairs"]) == ("sft", None)
    assert "margin" not in document["evals"][0]


def test_losses_of_different_objectives_are_not_compared(cli: Cli, home: Path) -> None:
    names = [run_of(home, objective).name for objective in ("sft", "dpo")]
    said = cli("runs", "compare", *names).out
    cells_of = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in said.splitlines()]
    rows = {cells[0]: cells[1:] for cells in cells_of if cells}
    for label, (own, other) in {"held-out loss (sft)": (0, 1), "held-out loss (dpo)": (1, 0)}.items():
        assert rows[label][own] == "0.7000 -> 0.5500"
        assert rows[label][other] == "-"
    assert "held-out accuracy" in said
    alike = cli("runs", "compare", names[1], run_of(home, "dpo").name).out
    assert "held-out loss (" not in alike


def test_a_plan_says_what_a_pair_takes_and_which_rate_is_advised(cli: Cli) -> None:
    asked = ("plan", "--model", "embedded", "--method", "lora", "--vram-gib", "8")
    outcome = cli(*asked, "--objective", "dpo", "--batch", "2")
    assert "2 x 2 x 1024 tokens" in outcome.out
    assert "note: each pair of answers is two full sequences" in outcome.out
    assert "40 times the 5e-06 of TRL's script" in outcome.out
    pairs = cli(*asked, "--objective", "orpo", "--batch", "2", "--lr", "8e-5", "--json").document
    rows = cli(*asked, "--batch", "4", "--json").document
    assert pairs["peak_bytes"] == rows["peak_bytes"]
    assert pairs["setup"]["objective"] == "orpo"
    assert not any("TRL" in note for note in pairs["notes"])
