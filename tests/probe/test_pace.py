"""Speed and hours of a recipe: from a card, from this machine's own runs, or honestly not at all."""

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from studio.commands.pace_text import pace_lines
from studio.core.calibration import Observation
from studio.core.gpu_catalogue import GIB, MIB, card_of_size, find_gpu
from studio.core.recipe import Recipe
from studio.core.schedule import total_steps_of
from studio.core.stock.setup import StockSetup
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of
from studio.probe.cards import Card
from studio.probe.data import read_data, split
from studio.probe.data.sampled import guess_rows
from studio.probe.device import Place
from studio.probe.models import find_base
from studio.probe.pace import calibrated, pace_of, pace_to_dict, process_of
from studio.probe.plan import plan_for
from studio.probe.setting import setting_of
from studio.runs.calibration import remember
from tests.core.published_speed import model

LLAMA = model("Llama-3.1-8B")
RECIPE = Recipe().with_("train.seq_len", 2048).with_("eval.rows", 0)
CARD = find_gpu("4090")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    row = json.dumps(
        {"messages": [{"role": "user", "content": "q" * 190}, {"role": "assistant", "content": "a" * 190}]}
    )
    path.write_text(f"{row}\n" * 800)
    return path


def seen(device: str = "NVIDIA GeForce RTX 4090", method: str = "qlora", **more: object) -> Observation:
    fields: dict[str, object] = {"run": "a", "at": 1.0, "setting": setting_of(device, method)}
    return Observation(**(fields | {"predicted": (10 * GIB, 11 * GIB, 12 * GIB)} | more))  # type: ignore[arg-type]


def test_rows_are_counted_and_their_text_is_weighed(rows: Path) -> None:
    guess = guess_rows(str(rows))
    assert guess is not None
    assert guess.rows == 800
    assert set(guess.text_bytes) == {380}, "the names of roles are no text"
    least, usual, most = guess.tokens_per_row(2048)
    assert least < usual < most
    assert usual == 380 / 4 + 15
    assert guess.tokens_per_row(64) == (64, 64, 64), "longer rows are cut"


def test_a_large_file_is_guessed_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_text('{"text": "' + "x" * 1000 + '"}\n' * 1 + ('{"text": "' + "x" * 1000 + '"}\n') * 4999)
    guess = guess_rows(str(path))
    assert guess is not None
    assert guess.rows == pytest.approx(5000, rel=0.01)
    assert len(guess.text_bytes) < 600


def test_every_kind_of_file_is_guessed_from_its_beginning(tmp_path: Path) -> None:
    chance = random.Random(5)  # noqa: S311
    texts = [
        {"prompt": "".join(chance.choices("abcdefgh ", k=200)), "completion": "".join(chance.choices("xyz ", k=300))}
        for _ in range(4000)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(texts, indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in texts)
    )
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "a.parquet")
    feather.write_feather(pa.Table.from_pylist(texts), tmp_path / "a.arrow", compression="uncompressed")
    (tmp_path / "parts").mkdir()
    for part in range(4):
        pq.write_table(pa.Table.from_pylist(texts[part::4]), tmp_path / "parts" / f"train-0000{part}-of-00004.parquet")
    (tmp_path / "line.json").write_text(json.dumps({"data": texts}))
    for name in (
        "a.jsonl",
        "a.json",
        "line.json",
        "a.jsonl.gz",
        "a.csv",
        "a.parquet",
        "a.arrow",
        "parts",
        "parts:train",
    ):
        guess = guess_rows(str(tmp_path / name))
        assert guess is not None, name
        assert guess.rows == pytest.approx(4000, rel=0.03), name
        assert set(guess.text_bytes) == {500}, name


def test_texts_of_a_folder_are_rows(tmp_path: Path) -> None:
    for place in range(3):
        (tmp_path / f"{place}.md").write_text("a" * (100 + place))
    guess = guess_rows(str(tmp_path))
    assert guess is not None
    assert (guess.rows, guess.text_bytes) == (3, (100, 101, 102))


@pytest.mark.parametrize("content", ["", "[1, 2]\n", "not json\n", '"text"\n', "\x00\xff", "[" * 100_000])
def test_what_is_no_json_lines_is_not_guessed(tmp_path: Path, content: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(content)
    assert guess_rows(str(path)) is None


def test_a_first_row_longer_than_the_look_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "completion": "a " * words}) + "\n" for words in (300_000, 1)))
    assert guess_rows(str(path)) is None


@pytest.mark.parametrize("word", ["", "/no/such/file", "~nobody-here/x", "a\0b", "x" * 5000])
def test_a_file_that_is_not_there_is_not_guessed(word: str) -> None:
    assert guess_rows(word) is None


def test_hours_follow_from_the_data(rows: Path) -> None:
    recipe = RECIPE.with_("data.path", str(rows)).with_("train.epochs", 2.0)
    pace = pace_of(recipe, LLAMA, setup_of(recipe), CARD)
    assert pace.steps == 200
    assert pace.tokens is not None
    assert pace.duration is not None
    assert pace.speed is not None
    assert pace.tokens[1] == 1600 * 110
    assert pace.duration.low < pace.duration.expected < pace.duration.high
    assert pace.duration.low == pytest.approx(pace.tokens[0] / pace.speed.high / 3600)
    longer = pace_of(recipe.with_("train.steps", 400), LLAMA, setup_of(recipe), CARD)
    assert longer.duration is not None
    assert longer.duration.high == pytest.approx(2 * pace.duration.high)


@pytest.mark.parametrize(("rows", "epochs", "steps"), [(4, 20.0, 20), (60, 3.0, 9), (1, 2.0, 2)])
def test_a_plan_counts_the_steps_that_a_run_on_few_rows_takes(
    tmp_path: Path, rows: int, epochs: float, steps: int
) -> None:
    """A step takes no row twice, and at most a fifth of the rows are held out, whatever the recipe asks for."""
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"ask {n}", "completion": f"say {n}"}) + "\n" for n in range(rows)))
    recipe = RECIPE
    for field, value in {
        "data.path": str(path),
        "train.epochs": epochs,
        "train.micro_batch": 2,
        "train.accumulation": 8,
        "eval.rows": 100 if rows > 1 else 0,
        "eval.samples": 0,
    }.items():
        recipe = recipe.with_(field, value)
    kept = len(split(read_data(path).rows, recipe.eval.rows, recipe.train.seed).train)
    run = total_steps_of(steps=0, epochs=epochs, rows=kept, rows_per_step=recipe.rows_per_step)
    assert pace_of(recipe, LLAMA, setup_of(recipe), CARD).steps == run == steps


def test_without_readable_data_there_are_no_hours() -> None:
    pace = pace_of(RECIPE.with_("data.path", "/no/such"), LLAMA, setup_of(RECIPE), CARD)
    assert pace.speed is not None
    assert (pace.duration, pace.tokens, pace.steps) == (None, None, None)


def test_nobody_invents_a_speed() -> None:
    for gpu, words in ((None, "processor"), (card_of_size(24), "--gpu")):
        pace = pace_of(RECIPE, LLAMA, setup_of(RECIPE), gpu)
        assert pace.speed is None
        assert words in pace.why_not
        document = pace_to_dict(pace)
        assert document["tokens_per_second"] is None
        assert document["hours"] is None


def test_runs_on_this_card_correct_speed_and_memory() -> None:
    setup = setup_of(RECIPE)
    before = pace_of(RECIPE, LLAMA, setup, CARD)
    estimate = estimate_vram(LLAMA, setup, CARD)
    assert calibrated(estimate, setup, CARD) is estimate
    sizes = {"allocated_bytes": 10 * GIB, "reserved_bytes": 10 * GIB + 512 * MIB, "device_bytes": 11 * GIB}
    remember(seen(speed_factor=1.3, **sizes))
    after = pace_of(RECIPE, LLAMA, setup, CARD)
    assert before.speed is not None
    assert after.speed is not None
    assert after.speed.expected == pytest.approx(1.3 * before.speed.expected)
    assert after.runs == 1
    corrected = calibrated(estimate, setup, CARD)
    assert corrected.device.high - corrected.device.low < estimate.device.high - estimate.device.low


def test_runs_of_another_kind_change_nothing() -> None:
    setup = setup_of(RECIPE)
    remember(seen("NVIDIA A100-SXM4-80GB", speed_factor=3.0))
    remember(seen(method="lora", run="b", speed_factor=3.0))
    assert pace_of(RECIPE, LLAMA, setup, CARD).runs == 0
    stock = StockSetup(method="lora")
    assert pace_of(RECIPE, LLAMA, stock, CARD).runs == 0, "the stock loop was never measured here"


def test_this_processor_is_known_after_its_first_run() -> None:
    setup = replace(setup_of(RECIPE), device="cpu")
    estimate = estimate_vram(LLAMA, setup)
    assert process_of(estimate, setup) is None
    remember(seen("cpu", operations_per_second=2e11, resident_bytes=11 * GIB))
    pace = pace_of(RECIPE, LLAMA, setup, None)
    assert pace.speed is not None
    assert 1 < pace.speed.expected < 10, "an 8 B model on two cores"
    process = process_of(estimate, setup)
    assert process is not None
    assert process.expected == estimate.allocated.expected + 1 * GIB


def test_a_card_that_no_table_lists_is_known_after_its_first_run() -> None:
    card = replace(card_of_size(24), name="NVIDIA Something New")
    setup = setup_of(RECIPE)
    assert pace_of(RECIPE, LLAMA, setup, card).speed is None
    remember(seen("NVIDIA Something New", operations_per_second=1e14))
    speed = pace_of(RECIPE, LLAMA, setup, card).speed
    assert speed is not None
    assert 1000 < speed.expected < 4000


def test_a_run_keeps_its_speed_and_what_others_held(rows: Path) -> None:
    recipe = Recipe().with_("data.path", str(rows))
    card = Card(0, "NVIDIA GeForce RTX 4090", "GPU-1", 24 * GIB, 2 * GIB, 22 * GIB, (8, 9))
    plan = plan_for(recipe, find_base("embedded"), place=Place(card))
    assert plan["tokens_per_second"]["low"] < plan["tokens_per_second"]["high"]
    assert plan["hours"]["low"] < plan["hours"]["high"]
    assert plan["card_used_bytes"] == 2 * GIB
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    here = plan_for(recipe, find_base("embedded"), place=Place())
    assert (here["tokens_per_second"], here["card_used_bytes"], here["setup"]["device"]) == (None, None, "cpu")


def test_a_pair_of_answers_goes_through_the_model_twice_with_its_prompt(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "p" * 400, "chosen": "c" * 800, "rejected": "r" * 200}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(100)))
    guess = guess_rows(str(path))
    assert guess is not None
    assert guess.tokens_per_row(2048, paired=True)[1] == (400 + 800 + 400 + 200) / 4.0 + 2 * 15
    assert guess.tokens_per_row(64, paired=True) == (128, 128, 128), "each side is cut"
    recipe = Recipe().with_("data.path", str(path)).with_("eval.rows", 0).with_("train.objective", "orpo")
    hours = []
    for objective, epochs in (("orpo", 1.0), ("dpo", 1.0), ("dpo", 3.0)):
        wanted = recipe.with_("train.objective", objective).with_("train.epochs", epochs)
        pace = pace_of(wanted, LLAMA, setup_of(wanted), CARD)
        assert pace.duration is not None
        hours.append(pace.duration.expected / pace.steps)
    # With checkpoints a step takes a row through the model three times; the base's pass comes once, not every epoch.
    assert hours[1] / hours[0] == pytest.approx(1 + 1 / 3, rel=0.01)
    assert hours[2] / hours[0] == pytest.approx(1 + 1 / 9, rel=0.05)


def test_long_texts_are_guessed_as_blocks(tmp_path: Path) -> None:
    path = tmp_path / "books.jsonl"
    path.write_text("\n".join(json.dumps({"text": "word " * words}) for words in (100, 4000, 8000)))
    guess = guess_rows(str(path))
    assert guess is not None and guess.plain
    blocks = guess.in_blocks(512, 0)
    exact = [max(1, -(-words * 5 // (511 * 4))) for words in (100, 4000, 8000)]
    assert blocks.rows == pytest.approx(sum(exact), abs=2)
    usual = blocks.tokens_per_row(512)[1]
    assert blocks.rows * usual == pytest.approx(12_100 * 5 / 4, rel=0.1), "no token is lost, and few are repeated"
    assert guess.in_blocks(512, 256).rows > 1.8 * blocks.rows


@pytest.mark.parametrize("name", ["book.txt", "book.jsonl"])
def test_a_book_that_is_one_line_is_guessed_from_its_size(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = "word " * 200_000
    path.write_text(text if name.endswith("txt") else json.dumps({"text": text}))
    guess = guess_rows(str(path))
    assert guess is not None and (guess.rows, guess.plain) == (1, True)
    assert guess.in_blocks(1024, 0).rows == pytest.approx(1_000_000 / 4 / 1023, rel=0.02)


def test_the_hours_of_a_text_are_those_of_all_its_tokens(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"text": "word " * 80_000}))
    recipe = Recipe().with_("data.path", str(path)).with_("train.seq_len", 1024).with_("eval.rows", 0)
    recipe = recipe.with_("eval.samples", 0)
    shape, gpu = LLAMA, CARD
    whole = pace_of(recipe, shape, setup_of(recipe, gpu), gpu, data_known=True)
    assert whole.tokens is not None and whole.tokens[1] == pytest.approx(100_000, rel=0.1)
    cut = pace_of(recipe.with_("data.blocks", False), shape, setup_of(recipe, gpu), gpu, data_known=True)
    assert cut.tokens is not None and cut.tokens[1] == 1024


def test_a_mixture_is_guessed_from_the_beginnings_of_its_files(tmp_path: Path, rows: Path) -> None:
    book = tmp_path / "book.jsonl"
    book.write_text("\n".join(json.dumps({"text": "word " * 800}) for _ in range(100)))
    recipe = Recipe().with_("eval.rows", 0).with_("eval.samples", 0).with_("train.seq_len", 512)
    recipe = recipe.with_("data.sources", [{"path": str(rows), "rows": 400}, {"path": str(book)}])
    shape, gpu = LLAMA, CARD
    found = pace_of(recipe, shape, setup_of(recipe, gpu), gpu, data_known=True)
    assert found.tokens is not None
    assert found.tokens[1] == pytest.approx(400 * 110 + 100 * 1000, rel=0.15)
    assert [(path, rows) for path, rows, _ in found.sources] == [(str(rows), 400), (str(book), 100)]
    assert sum(tokens for *_, tokens in found.sources) == pytest.approx(found.tokens[1], rel=0.05)
    assert "rows.jsonl 400 rows (80%, about 3" in pace_lines(found, setup_of(recipe, gpu))[0]
    assert pace_to_dict(found)["sources"][1]["rows"] == 100
    gone = recipe.with_("data.sources", [{"path": str(rows)}, {"path": str(tmp_path / "none.jsonl")}])
    assert pace_of(gone, shape, setup_of(gone, gpu), gpu, data_known=True).tokens is None
