"""`lora-studio plan`: the contract's flags, fields and exit codes, and what it makes of bad input."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio.commands import card_flags as verb
from studio.core.gpu_catalogue import GIB, MIB
from studio.probe.cards import Card, CardProcess
from studio.probe.device import Sight
from studio.runs.recipe_file import shipped_recipes
from tests.cli.conftest import Cli
from tests.core.published_rows import DATA

CONFIGS: dict[str, dict[str, Any]] = json.loads((DATA / "model_configs.json").read_text(encoding="utf-8"))
FIELDS = {
    *("peak_bytes", "reserved_bytes", "device_bytes", "low_bytes", "high_bytes", "fits", "budget_bytes", "stage"),
    *("components", "trainable_parameters", "engine"),
}


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "look", lambda: Sight(None))


@pytest.fixture
def llama(home: Path) -> str:
    path = Path("config.json")
    path.write_text(json.dumps(CONFIGS["Llama-3.1-8B"]))
    return str(path)


def peak(cli: Cli, *words: str) -> int:
    outcome = cli("plan", *words, "--json")
    assert outcome.code in (0, 1), outcome
    return int(outcome.document["peak_bytes"])


def test_a_config_alone_is_enough(cli: Cli, llama: str) -> None:
    outcome = cli("plan", "--model", llama, "--method", "qlora", "--seq", "2048", "--gpu", "4090", "--json")
    document = outcome.document
    assert outcome.code == 0
    assert outcome.err == ""
    assert set(document) >= FIELDS
    assert document["model"]["parameters"] == 8_030_261_248
    assert document["trainable_parameters"] == 41_943_040
    assert document["budget_bytes"] == 24564 * MIB
    assert (document["fits"], document["verdict"], document["engine"]) == (True, "fits", "studio")
    assert document["device_bytes"] < 9 * GIB


def test_which_layers_are_computed_again(cli: Cli, llama: str) -> None:
    words = ("plan", "--model", llama, "--method", "qlora", "--seq", "2048", "--batch", "4", "--gpu", "4090", "--json")
    auto = cli(*words, "--recompute", "auto").document
    assert 0 < auto["setup"]["recompute"] < 32
    assert auto["fits"]
    assert f"{auto['setup']['recompute']} of 32 layers are computed again" in " ".join(auto["notes"])
    fewer = cli(*words, "--recompute", str(auto["setup"]["recompute"] - 1)).document
    assert not fewer["fits"]
    every, none = (cli(*words, flag).document for flag in ("--grad-checkpointing", "--no-grad-checkpointing"))
    assert (every["setup"]["recompute"], none["setup"]["recompute"]) == ("all", "none")
    assert (every["setup"]["grad_checkpointing"], none["setup"]["grad_checkpointing"]) == (True, False)
    assert every["high_bytes"] < auto["high_bytes"] <= auto["budget_bytes"] < fewer["high_bytes"] < none["high_bytes"]
    speeds = [plan["tokens_per_second"]["expected"] for plan in (every, auto, fewer, none)]
    assert speeds == sorted(speeds)
    outcome = cli(*words, "--engine", "hf", "--recompute", "8")
    assert outcome.code == 2
    assert "all layers or none" in outcome.err


def test_exit_codes(cli: Cli, llama: str) -> None:
    words = ("plan", "--model", llama, "--method", "lora")
    assert cli(*words).code == 0, "no card: nothing to fit"
    assert cli(*words, "--vram-gib", "80").code == 0
    assert cli(*words, "--vram-gib", "8").code == 1
    document = cli(*words, "--vram-gib", "8", "--json").document
    assert (document["fits"], document["verdict"]) == (False, "does not fit")
    assert document["headroom_bytes"] < 0
    expected = cli(*words, "--json").document["device_bytes"]
    tight = cli(*words, "--vram-gib", str(expected / GIB + 0.01), "--json")
    assert (tight.code, tight.document["verdict"], tight.document["fits"]) == (1, "tight", False)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("--rank 8", "--rank 64"),
        ("--batch 1", "--batch 4"),
        ("--seq 512", "--seq 4096"),
        ("--targets q_proj,v_proj", "--targets all-linear"),
        ("--optimizer adamw_8bit", "--optimizer adamw_torch"),
        ("--grad-checkpointing", "--no-grad-checkpointing"),
        ("--attention sdpa --seq 4096", "--attention eager --seq 4096"),
        ("--loss chunked", "--loss full"),
        ("--dtype bf16", "--dtype fp32"),
        ("--double-quant", "--no-double-quant"),
        ("--method qlora", "--method lora"),
        ("--engine studio", "--engine hf"),
        ("--engine hf --no-kbit-prepare", "--engine hf --kbit-prepare"),
        ("--engine hf --head-cast-back", "--engine hf --no-head-cast-back"),
        ("--engine hf --fused-kernels foak", "--engine hf --fused-kernels none"),
        ("--engine hf --fused-kernels liger", "--engine hf --fused-kernels foak"),
        ("--engine hf --no-outputs-kept", "--engine hf --outputs-kept"),
        ("--engine hf --quant-type nf4", "--engine hf --quant-type int8"),
        ("--engine hf --quant-type int8 --transformers 4.57.1", "--engine hf --quant-type int8 --transformers 5.24"),
        ("--gpus 1", "--gpus 2"),
        ("--set train.accumulation=1", "--set train.accumulation=8"),
    ],
)
def test_every_flag_counts(cli: Cli, llama: str, less: str, more: str) -> None:
    assert peak(cli, "--model", llama, *less.split()) < peak(cli, "--model", llama, *more.split())


def test_flags_win_over_the_recipe_and_settings_over_its_file(cli: Cli, llama: str) -> None:
    path = Path("mine.toml")
    path.write_text("method = 'lora'\n[adapter]\nrank = 4\n[train]\naccumulation = 8\n")
    document = cli("plan", str(path), "--model", llama, "--set", "adapter.rank=8", "--json").document
    assert (document["setup"]["rank"], document["setup"]["method"], document["setup"]["accumulation"]) == (8, "lora", 8)
    assert cli("plan", str(path), "--model", llama, "--rank", "2", "--json").document["setup"]["rank"] == 2


def test_the_embedded_model_and_a_shipped_recipe_need_nothing_else(cli: Cli) -> None:
    document = cli("plan", "demo", "--json").document
    assert document["model"]["parameters"] == 134_515_008
    assert cli("plan", "--model", "embedded", "--json").document["model"] == document["model"]


def test_the_stock_loop_is_the_heavier_one(cli: Cli, llama: str) -> None:
    words = ("--model", llama, "--method", "qlora", "--seq", "2048", "--engine", "hf")
    document = cli("plan", *words, "--json").document
    assert document["engine"] == "hf"
    assert document["setup"]["kbit_prepare"] is True
    assert document["setup"]["loss"] == "full"
    assert cli("plan", *words, "--loss", "chunked", "--json").document["setup"]["loss"] == "chunked"


def test_eight_bit_weights_are_planned_for_the_stock_loop(cli: Cli, llama: str) -> None:
    words = ("plan", "--model", llama, "--engine", "hf", "--quant-type", "int8", "--gpu", "a100-80gb")
    document = cli(*words, "--json").document
    assert document["setup"]["quant_type"] == "int8"
    linears = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    embeddings = 2 * 128256 * 4096 * 4  # fp32 after peft's upcast
    assert document["components"]["base"] == pytest.approx(linears + embeddings, rel=0.01)
    assert document["tokens_per_second"] is None
    out = cli(*words).out
    assert "qlora on int8 rank 16" in out
    assert "note: 8-bit weights are counted from bitsandbytes' source" in out
    assert "speed: not known" in out


def test_people_get_the_same_numbers_in_words(cli: Cli, llama: str) -> None:
    outcome = cli("plan", "--model", llama, "--method", "lora", "--gpu", "T4")
    assert outcome.code == 1
    for word in ("base", "activations", "backward", "the card will show", "range", "does not fit", "Tesla T4"):
        assert word in outcome.out
    stock = cli("plan", "--model", llama, "--method", "lora", "--gpu", "T4", "--engine", "hf").out
    assert "note: without flash attention" in stock


def test_this_machine_s_card_and_what_is_free_on_it(cli: Cli, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Card(0, "NVIDIA GeForce RTX 4090", None, 24564 * MIB, 4564 * MIB, 20000 * MIB, (8, 9))
    monkeypatch.setattr(verb, "look", lambda: Sight([reading]))
    document = cli("plan", "--model", llama, "--json").document
    assert document["budget_bytes"] == 20000 * MIB
    assert document["gpu"] == {"name": "NVIDIA GeForce RTX 4090", "total_bytes": 24564 * MIB}
    limited = cli("plan", "--model", llama, "--set", "device.budget_gib=12", "--json").document
    assert limited["budget_bytes"] == 12 * GIB
    assert cli("plan", "--model", llama, "--set", "device.device=cpu", "--json").document["budget_bytes"] is None


def test_who_else_is_on_the_card_is_named(cli: Cli, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    others = (CardProcess(1200, "Xorg", 312 * MIB), CardProcess(77, None, None))
    reading = Card(0, "NVIDIA GeForce RTX 4090", None, 24564 * MIB, 564 * MIB, 24000 * MIB, (8, 9), processes=others)
    monkeypatch.setattr(verb, "look", lambda: Sight([reading]))
    assert "used by Xorg (pid 1200, 312.0 MiB), unnamed (pid 77, ?)" in cli("plan", "--model", llama).out
    document = cli("plan", "--model", llama, "--json").document
    assert document["card"]["processes"][0] == {"pid": 1200, "name": "Xorg", "used_bytes": 312 * MIB}
    assert cli("plan", "--model", llama, "--gpu", "4090", "--json").document["card"] is None


def test_an_instance_of_a_card_has_its_share_of_speed(cli: Cli, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Card(0, "NVIDIA A100-SXM4-80GB", None, 81920 * MIB, 0, 81920 * MIB, (8, 0), mig=False)
    part = replace(whole, total_bytes=20480 * MIB, free_bytes=20480 * MIB, mig=True)
    speeds = []
    for reading in (whole, part):
        monkeypatch.setattr(verb, "look", lambda: Sight([reading]))  # noqa: B023  used at once
        document = cli("plan", "--model", llama, "--method", "qlora", "--batch", "4", "--json").document
        speeds.append(document["tokens_per_second"]["expected"])
    assert speeds[0] / speeds[1] == pytest.approx(4, rel=0.05)
    assert document["budget_bytes"] == 20480 * MIB


def test_dtype_follows_the_card(cli: Cli, llama: str) -> None:
    assert cli("plan", "--model", llama, "--gpu", "T4", "--json").document["setup"]["dtype"] == "fp16"
    assert cli("plan", "--model", llama, "--gpu", "L4", "--json").document["setup"]["dtype"] == "bf16"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--model nowhere/at/all", "nowhere"),
        ("--model ./config.json --rank 0", "adapter.rank"),
        ("--model ./config.json --rank 5000", "adapter.rank"),
        ("--model ./config.json --rank x", "adapter.rank"),
        ("--model ./config.json --batch -1", "micro_batch"),
        ("--model ./config.json --seq 99999999999999999999", "seq_len"),
        ("--model ./config.json --targets q_porj", "q_proj"),
        ("--model ./config.json --gpu 9999x", "9999x"),
        ("--model ./config.json --vram-gib nan", "--vram-gib"),
        ("--model ./config.json --vram-gib -3", "--vram-gib"),
        ("--model ./config.json --gpus 0", "--gpus"),
        ("--model ./config.json --gpus 1.5", "--gpus"),
        ("--model ./config.json --gpu T4 --vram-gib 16", "--gpu"),
        ("--model ./config.json --method qloar", "qloar"),
        ("--model ./config.json --kbit-prepare", "--engine hf"),
        ("--model ./config.json --quant-type int8", "--engine hf"),
        ("--model ./config.json --engine hf --quant-type int8 --method lora", "--method qlora"),
        ("--model ./config.json --quant-type int4", "int8"),
        ("--model ./config.json --set model.quant_type=int8", "nf4 or fp4"),
        ("--model ./config.json --fused-kernels liger", "--engine hf"),
        ("--model ./config.json --engine hf --fused-kernels unsloth", "foak"),
        ("--model ./config.json --set train.lerning_rate=1", "learning_rate"),
        ("nowhere.toml", "nowhere"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(cli: Cli, llama: str, words: str, found: str) -> None:
    outcome = cli("plan", *words.split(), "--json")
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert found in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "config"),
        (b"{", "config"),
        (b"[]", "config"),
        (b"\xff\xfe", "config"),
        (b'{"model_type": "llama"}', "hidden_size"),
        (b'{"model_type": "llama", "hidden_size": -1}', "hidden_size"),
        (b'{"model_type": "llama", "hidden_size": 1e400}', "hidden_size"),
        (b'{"model_type": "llama", "hidden_size": NaN}', "hidden_size"),
        (b'{"model_type": "llama", "hidden_size": true}', "hidden_size = True"),
        (b'{"model_type": "llama", "hidden_size": "4096"}', "hidden_size"),
        (b'{"model_type": "llama", "hidden_size": "\\u001b[2J"}', "hidden_size = '\\x1b[2J'"),
        (b'{"model_type": "llama", "hidden_size": "\\ud800"}', "hidden_size = '\\ud800'"),
        (b'{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1001}', "num_hidden_layers"),
        (b'\xef\xbb\xbf{"model_type": "llama"}', "byte order mark"),
        ('{"model_type": "llama"}'.encode("utf-16"), "is not JSON"),
        (b"[" * 100_000, "config"),
    ],
)
def test_a_damaged_config(cli: Cli, content: bytes, found: str) -> None:
    Path("config.json").write_bytes(content)
    outcome = cli("plan", "--model", "config.json", "--json")
    assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (2, "", 1)
    assert found in outcome.err


def test_a_long_and_hostile_architecture_is_cut_and_shown_harmless(cli: Cli) -> None:
    config = CONFIGS["SmolLM2-135M"] | {"model_type": "\x1b]0;" + "x" * 100_000}
    Path("config.json").write_text(json.dumps(config))
    outcome = cli("plan", "--model", "config.json")
    assert outcome.code == 0
    assert "\x1b" not in outcome.out
    assert len(outcome.out) < 4000


@pytest.mark.parametrize("size_bytes", [8 * MIB + 1, 100 * MIB])
def test_a_huge_config_is_not_read(cli: Cli, size_bytes: int) -> None:
    with Path("config.json").open("wb") as file:
        file.truncate(size_bytes)
    outcome = cli("plan", "--model", "config.json")
    assert outcome.code == 2
    assert "config.json is larger than 8 MiB" in outcome.err


@pytest.mark.parametrize("length", [0, 8, 2**63, 100_000_001])
def test_a_hostile_safetensors_file_beside_the_config(cli: Cli, length: int) -> None:
    folder = Path("model")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["SmolLM2-135M"]))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    outcome = cli("plan", "--model", "model")
    assert outcome.code == 2
    assert "model.safetensors" in outcome.err


def test_nothing_heavy_is_imported(home: Path, llama: str) -> None:
    script = (
        "import sys\nfrom studio.cli import main\n"
        f"code = main(['plan', '--model', {llama!r}, '--gpu', '4090', '--json'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'textual', 'huggingface_hub'} & set(sys.modules)\n"
        "print(code, sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "0 []"


def test_speed_and_time_are_told_as_ranges(cli: Cli, llama: str) -> None:
    document = cli("plan", "--model", llama, "--method", "qlora", "--seq", "2048", "--gpu", "4090", "--json").document
    speed = document["tokens_per_second"]
    assert 100 < speed["low"] < speed["expected"] < speed["high"] < 10_000
    assert speed["basis"]
    assert document["hours"] is None, "no data was named"
    hours = cli("plan", "demo", "--model", llama, "--gpu", "4090", "--json").document["hours"]
    assert 0 < hours["low"] <= hours["expected"] <= hours["high"]
    assert 1.0 < document["qlora_slowdown"]["low"] < document["qlora_slowdown"]["high"] < 2.0
    words = cli("plan", "--model", llama, "--method", "qlora", "--gpu", "4090").out
    assert "tokens/s" in words
    assert "4 bit: a step takes" in words


def test_the_rows_that_it_will_learn_from_are_counted_and_a_shorter_length_is_named(cli: Cli, llama: str) -> None:
    rows = [{"prompt": f"list {n} files by size", "completion": "ls -lS"} for n in range(60)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("plan", "--model", llama, "--data", "mine.jsonl", "--seq", "2048")
    document = cli(*words, "--gpu", "4090", "--json").document
    assert document["steps"] and document["hours"]["low"] > 0
    longest = document["longest_row_tokens"]
    assert 8 <= longest["low"] < longest["expected"] < longest["high"] < 128
    said = cli(*words, "--gpu", "4090").out
    assert "length: the longest row has about" in said and "--seq 128 takes less memory and cuts none" in said
    assert "length:" not in cli(*words[:-1], "128", "--gpu", "4090").out
    without_speed = cli(*words, "--vram-gib", "24").out
    assert f"data: {document['steps']} steps of" in without_speed and "speed: not known" in without_speed
    assert cli("plan", "demo", "--data", "mine.jsonl", "--gpu", "4090", "--json").document["steps"] == 28


def test_rows_that_are_not_there_are_said(cli: Cli, llama: str) -> None:
    gone = cli("plan", "--model", llama, "--data", "gone.jsonl")
    assert (gone.code, gone.out) == (2, "")
    assert "gone.jsonl does not exist" in gone.err
    assert "the rows of some/rows are not here" in cli("plan", "--model", llama, "--data", "some/rows").out


def test_a_speed_that_nobody_can_know_is_not_invented(cli: Cli, llama: str) -> None:
    for words in (("--vram-gib", "24"), ()):
        outcome = cli("plan", "--model", llama, *words, "--json")
        assert (outcome.document["tokens_per_second"], outcome.document["hours"]) == (None, None)
        assert outcome.document["tokens_per_second_unknown"]
    assert "speed: not known" in cli("plan", "--model", llama).out


@pytest.mark.parametrize(
    "content", [b"\x00\xffgarbage", b'{"schema": 1, "observations": [{"at": 1e999}]}', b"[" * 99_999]
)
def test_a_broken_calibration_never_breaks_a_plan(cli: Cli, llama: str, home: Path, content: bytes) -> None:
    words = ("plan", "--model", llama, "--gpu", "4090", "--json")
    before = cli(*words).document
    home.mkdir(exist_ok=True)
    (home / "calibration.json").write_bytes(content)
    outcome = cli(*words)
    assert (outcome.code, outcome.err, outcome.document) == (0, "", before)


@pytest.mark.parametrize("place", ["~nobody-here/home", "/dev/null/home", "x" * 300])
def test_a_home_that_cannot_be_looked_into_never_breaks_a_plan(
    cli: Cli, llama: str, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("LORA_STUDIO_HOME", place)
    assert cli("plan", "--model", llama, "--gpu", "4090", "--json").code == 0


def test_a_calibration_that_may_not_be_read_never_breaks_a_plan(
    cli: Cli, llama: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(exist_ok=True)
    (home / "calibration.json").write_text("{}")

    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "calibration.json":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert cli("plan", "--model", llama, "--gpu", "4090", "--json").code == 0


def test_an_unknown_architecture_has_a_wide_range_and_a_way_to_know(cli: Cli, llama: str) -> None:
    config = CONFIGS["Llama-3.1-8B"] | {"model_type": "brand_new", "architectures": ["BrandNewForCausalLM"]}
    Path("new.json").write_text(json.dumps(config))
    known = cli("plan", "--model", llama, "--json").document
    guessed = cli("plan", "--model", "new.json", "--json").document
    spread = [plan["ranges"]["allocated"]["high"] / plan["peak_bytes"] for plan in (known, guessed)]
    assert spread[1] > 1.2 > spread[0]
    assert any("brand_new" in note for note in guessed["notes"])
    assert any("lora-studio measure" in note for note in guessed["notes"])
    assert not any("measure" in note for note in known["notes"])


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_planned_offline_and_says_whose_config_that_was(cli: Cli, name: str) -> None:
    plan = cli("plan", name, "--vram-gib", "80", "--json").document
    assert plan["fits"]
    assert plan["model"]["parameters"] > 10**8
    own = [note for note in plan["notes"] if note.startswith("the config is this program's own copy")]
    assert len(own) == (name != "demo")


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_known_model_is_planned_by_its_name_alone_without_a_connection(cli: Cli, all_of_them: bool) -> None:
    listed = cli("models", "--known", "--json").document
    assert len(listed) > 100
    asked = listed if all_of_them else [one for one in listed if one["model"].endswith(("/Qwen3-0.6B", "/gemma-2-2b"))]
    for known in asked:
        planned = cli("plan", known["model"], "--method", "qlora", "--vram-gib", "4000", "--json")
        assert planned.code == 0, planned.err
        document = planned.document
        assert document["fits"]
        (origin,) = [note for note in document["notes"] if "this program's own copy" in note]
        page = f"accept its terms at https://huggingface.co/{known['model']}"
        assert (page in origin) == known["gated"]
    assert cli("plan", asked[0]["model"], "--model", "embedded", "--json").code == 2, "a recipe was named, too"


def test_the_config_of_another_hub_model_is_not_made_up(cli: Cli) -> None:
    outcome = cli("plan", "--model", "owner/Llama-3.1-8B-finetuned", "--gpu", "4090")
    assert (outcome.code, outcome.out) == (2, "")
    assert "cannot be found" in outcome.err


def test_the_trade_is_a_table_and_a_list(cli: Cli, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 12 GB: LoRA does not fit, QLoRA does, a part of the base is streamed, some layers stay in 16 bit."""
    monkeypatch.setattr("studio.commands.trade_text.ram_bytes", lambda: 32 * 2**30)
    words = ("plan", "--model", llama, "--method", "qlora", "--gpu", "RTX 4070", "--trade")
    outcome = cli(*words)
    told = outcome.out.split("the trade ")[1]
    for part in ("LoRA, ", "layers streamed", "layers in 16 bit", "not measured", "as LoRA", "does not fit"):
        assert part in told
    plan = json.loads(cli(*words, "--json").out)
    columns = {one["column"]: one for one in plan["trade"]}
    assert list(columns) == ["lora", "qlora", "streamed", "mixed"]
    assert [one["verdict"] for one in columns.values()] == ["does not fit", "fits", "fits", "fits"]
    assert columns["qlora"]["device"]["expected"] == plan["device_bytes"]
    assert columns["streamed"]["host_bytes"] > 0
    assert columns["streamed"]["recipe"]["model.stream"] > 2
    assert set(columns["mixed"]["recipe"]["model.precision"].values()) == {"16bit"}
    assert [one["fidelity"] for one in columns.values()] == ["the reference", "not measured", "as LoRA", "not measured"]
    for column, one in columns.items():
        choices = [f"{path}={value}" for path, value in one["recipe"].items() if path != "model.precision"]
        kept = ",".join(f"{name}={word}" for name, word in one["recipe"]["model.precision"].items())
        flags = [flag for choice in (*choices, f"model.precision={kept}") for flag in ("--set", choice)]
        again = json.loads(cli("plan", "--model", llama, "--gpu", "RTX 4070", *flags, "--json").out)
        assert again["device_bytes"] == one["device"]["expected"], column
