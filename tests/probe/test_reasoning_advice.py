"""Rows without reasoning for a model that reasons: advised of once, wherever the data are checked."""

import json
from pathlib import Path

import pytest

from studio.cli import main
from studio.core.recipe import Recipe
from studio.probe.data import Conversation, Message, PlainText, Preference, Row
from studio.probe.preflight import check_training
from studio.probe.reasoning_advice import reasoning_advice
from studio.probe.setup import check_data
from tests.fakes.tiny_model import make_tiny_model

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "thinker")
    (folder / "chat_template.jinja").write_text(THINKS)
    return folder


def rows(plain: int, thinking: int) -> list[Row]:
    asked = Message("user", "why?")
    return [
        *(Conversation((asked, Message("assistant", "so")), place) for place in range(plain)),
        *(Conversation((asked, Message("assistant", "so", reasoning="hm")), place) for place in range(thinking)),
    ]


def test_three_reasoning_rows_in_four_are_enough(reasoning: Path) -> None:
    assert reasoning_advice(reasoning, rows(25, 75)) == ""
    assert "about 74% of the rows do" in reasoning_advice(reasoning, rows(26, 74))
    assert "none of the rows do" in reasoning_advice(reasoning, rows(5000, 0))
    told = reasoning_advice(reasoning, rows(10, 0))
    assert "75 % rows with reasoning" in told and "qwen.readthedocs.io" in told


def test_marks_in_the_text_and_preferred_answers_count(reasoning: Path) -> None:
    asked = (Message("user", "why?"),)
    marked = Conversation((*asked, Message("assistant", "<think>hm</think>so")), 1)
    pair = Preference(asked, (Message("assistant", "so", reasoning="hm"),), (Message("assistant", "no"),), 2)
    assert reasoning_advice(reasoning, [marked, pair]) == ""


def test_nothing_is_said_of_other_models_and_of_plain_text(reasoning: Path, tmp_path: Path) -> None:
    assert reasoning_advice(make_tiny_model(tmp_path / "plain"), rows(10, 0)) == ""
    assert reasoning_advice(reasoning, [PlainText("so", 1)]) == ""
    assert reasoning_advice(None, rows(10, 0)) == ""


def test_check_set_up_and_start_say_it_alike(
    reasoning: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"why {n}?", "completion": f"so {n}"}) for n in range(20)))
    recipe = Recipe().with_("model.base", str(reasoning)).with_("data.path", str(path)).with_("device.device", "cpu")
    (told,) = (note for note in check_training(recipe).notes if "reasons before" in note)
    assert check_data(str(path), str(reasoning)).advice == told
    assert main(["data", "check", str(path), "--model", str(reasoning), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"] == told
    assert main(["data", "check", str(path), "--model", str(reasoning)]) == 0
    assert capsys.readouterr().out.count(told) == 1
    assert main(["data", "show", str(path), "--model", str(reasoning), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"].count(told) == 1
    off = recipe.with_("data.template_kwargs", {"enable_thinking": False})
    assert not any("reasons before" in note for note in check_training(off).notes)
