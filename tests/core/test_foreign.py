"""Other tools' settings as a recipe: what each means here, and a reason for each that has no place."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from studio.core.errors import BadInput, StudioError
from studio.core.foreign.axolotl import carry_axolotl
from studio.core.foreign.carry import Carrier, Setting, Unread
from studio.core.foreign.llama_factory import carry_llama_factory
from studio.core.foreign.python_calls import calls_of
from studio.core.foreign.script import carry_script
from studio.core.foreign.trl import OF_MODEL_CONFIG, OF_TRL, carry_trl
from studio.core.sources import Source
from tests.core.foreign_keys import AXOLOTL, LLAMA_FACTORY, TRAINER, TRL

_INFOS = {
    "pairs": {
        "hf_hub_url": "owner/pairs",
        "subset": "en",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "chosen": "chosen", "rejected": "rejected"},
    },
    "own": {"file_name": "own.json", "columns": {"prompt": "frage", "response": "antwort"}},
    "some": {"hf_hub_url": "owner/some", "num_samples": 50, "split": "train_sft"},
}


def _axolotl(**settings: Any) -> Carrier:
    return _carried("axolotl", carry_axolotl, {"base_model": "a/b", "adapter": "lora", **settings})


def _factory(**settings: Any) -> Carrier:
    return _carried("LLaMA-Factory", lambda carrier: carry_llama_factory(carrier, _INFOS, "/data"), settings)


def _trl(**settings: Any) -> Carrier:
    return _carried("TRL", lambda carrier: carry_trl(carrier, {**OF_TRL, **OF_MODEL_CONFIG}), settings)


def _carried(tool: str, carry: Callable[[Carrier], None], settings: dict[str, Any]) -> Carrier:
    carrier = Carrier(tool, {key: Setting(key, value) for key, value in settings.items()})
    carry(carrier)
    carrier.leave_rest()
    return carrier


def _values(carrier: Carrier, *paths: str) -> tuple[Any, ...]:
    recipe = carrier.recipe("it")
    return tuple(recipe.get(path) for path in paths)


def _left(carrier: Carrier) -> dict[str, tuple[str, bool]]:
    return {one.setting.key: (one.why, one.matters) for one in carrier.left}


@pytest.mark.parametrize(
    ("keys", "carry"),
    [(AXOLOTL, _axolotl), (LLAMA_FACTORY + TRAINER, _factory), (TRL + TRAINER, _trl)],
    ids=["axolotl", "LLaMA-Factory", "TRL"],
)
def test_every_setting_of_the_tools_is_carried_or_has_a_reason(keys: str, carry: Callable[..., Carrier]) -> None:
    for key in keys.split():
        unknown = [one for one in carry(**{key: True}).left if "that this program knows" in one.why]
        assert not unknown, key
    assert "not a setting of" in _left(carry(nobodys_key=True))["nobodys_key"][0]


def test_axolotl_names_the_same_things_otherwise() -> None:
    carrier = _axolotl(
        adapter="qlora", load_in_4bit=True, lora_r=32, lora_alpha=16, lora_target_linear=True, lora_dropout="5e-2",
        sequence_len=4096, sample_packing=True, micro_batch_size=2, batch_size=16, num_epochs=4, learning_rate="2e-4",
        optimizer="adamw_bnb_8bit", lr_scheduler="constant_with_warmup", warmup_ratio=0.1, train_on_inputs=True,
        gradient_checkpointing="offload", save_strategy="no", max_grad_norm=0.3, seed=7, val_set_size=200,
        wandb_project="x",
        datasets=[{"path": "o/d", "name": "small", "split": "train[:500]", "type": "alpaca", "revision": "v1"}],
    )  # fmt: skip
    assert _values(
        carrier, "method", "adapter.rank", "adapter.alpha", "adapter.targets", "adapter.dropout", "train.seq_len",
        "train.packing", "train.micro_batch", "train.accumulation", "train.epochs", "train.learning_rate",
        "train.optimizer", "train.schedule", "train.warmup_fraction", "data.answers_only", "train.recompute",
        "train.offload_checkpoints", "train.checkpoint_every", "train.max_grad_norm", "train.seed", "eval.rows",
        "data.template",
    ) == (
        "qlora", 32, 16.0, "all-linear", 0.05, 4096, "on", 2, 8, 4.0, 2e-4, "adamw_8bit", "constant", 0.1, False, "all",
        True, 0, 0.3, 7, 200, "alpaca",
    )  # fmt: skip
    assert carrier.recipe("it").data.sources == (Source("o/d#small@v1", rows=500, format="alpaca"),)
    assert "rows are counted" in carrier.carried["train.packing"].note
    assert carrier.recipe("it").problems() == ()
    assert _left(carrier) == {"wandb_project": (_left(carrier)["wandb_project"][0], False)}


def test_axolotls_data_sets_keep_their_columns() -> None:
    said = {
        "path": "o/chats",
        "type": "chat_template",
        "field_messages": "talk",
        "message_property_mappings": {"role": "who", "content": "value"},
        "roles": {"user": ["human"], "assistant": ["bot"]},
        "roles_to_train": ["assistant"],
        "train_on_eos": "last",
    }
    carrier = _axolotl(datasets=[said], test_datasets=[{"path": "o/chats", "split": "test"}])
    assert _values(carrier, "data.columns", "data.eval_path") == (
        (("messages", "talk"), ("role", "who"), ("assistant", "bot")),
        "o/chats:test",
    )
    assert list(_left(carrier)) == ["datasets: train_on_eos"]
    raw = _axolotl(pretraining_dataset=[{"path": "o/books", "text_column": "body"}], max_steps=100, warmup_steps=10)
    assert _values(raw, "data.path", "data.format", "data.columns", "train.steps", "train.warmup_fraction") == (
        "o/books", "text", (("text", "body"),), 100, 0.1,
    )  # fmt: skip
    several = _axolotl(
        datasets=[{"path": "a.jsonl", "type": "completion"}, {"path": "o/b", "split": "x", "type": "odd.load"}]
    )
    assert several.recipe("it").data.sources == (Source("a.jsonl", format="text"), Source("o/b:x"))
    assert list(_left(several)) == ["datasets: type"]


def test_what_a_tool_does_where_nothing_is_said_is_carried_too() -> None:
    paths = ("adapter.rank", "adapter.alpha", "train.epochs", "train.learning_rate", "train.schedule", "train.seed")
    assert _values(_factory(), *paths) == (8, 16.0, 3.0, 5e-5, "linear", 42)
    assert _values(_factory(lora_rank=4), *paths[:2]) == (4, 8.0)
    assert _values(_trl(use_peft=True), *paths) == (16, 32.0, 3.0, 2e-5, "linear", 42)
    assert _values(_axolotl(), "train.seq_len", "train.schedule", "eval.rows", "eval.samples") == (512, "cosine", 0, 0)
    assert all(one.setting is None for one in _factory().carried.values())


def test_the_handbooks_mixture_keeps_its_splits() -> None:
    carrier = _trl(
        model_name_or_path="a/b", use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True, beta=0.01,
        dataset_mixer={"owner/pairs": 1.0}, dataset_splits=["train_prefs", "test_prefs"],
    )  # fmt: skip
    assert _values(
        carrier,
        "method",
        "model.double_quant",
        "train.objective",
        "train.beta",
        "data.path",
        "data.split",
        "data.eval_path",
    ) == ("qlora", True, "dpo", 0.01, "owner/pairs", "train_prefs", "owner/pairs:test_prefs")
    assert _left(carrier) == {}


def test_llama_factorys_data_sets_are_looked_up() -> None:
    one = _factory(
        model_name_or_path="a/b", dataset="own", quantization_bit=4, double_quantization=False, mask_history=True
    )
    assert _values(one, "method", "model.double_quant", "data.path", "data.columns", "data.last_answer_only") == (
        "qlora", False, "/data/own.json", (("instruction", "frage"), ("completion", "antwort")), True,
    )  # fmt: skip
    eight = _factory(model_name_or_path="a/b", dataset="own", quantization_bit=8)
    assert _values(eight, "method", "model.precision") == ("qlora", (("*", "int8"),))
    pairs = _factory(stage="dpo", dataset="pairs", pref_beta=0.2, dpo_label_smoothing=0.1)
    assert _values(pairs, "train.objective", "train.beta", "data.path", "data.config", "data.columns") == (
        "dpo", 0.2, "owner/pairs", "en", (("messages", "talk"),),
    )  # fmt: skip
    assert "conservative" in _left(pairs)["dpo_label_smoothing"][0]
    mixed = _factory(dataset="own, some", mix_strategy="interleave_under", interleave_probs="0.7,0.3", max_samples=1000)
    own, some = mixed.recipe("it").data.sources
    assert (own.weight, some.path, some.weight) == (0.7, "owner/some:train_sft", 0.3)
    assert _left(mixed)["max_samples"][1]
    assert _values(_factory(stage="pt", dataset="own"), "data.format", "data.columns") == ("text", (("text", "frage"),))
    unknown = _factory(dataset="nobodys")
    assert _values(unknown, "data.path") == ("nobodys",)
    assert "does not know it" in _left(unknown)["dataset"][0]


def test_what_is_not_trained_here_is_refused() -> None:
    for carry, settings, word in (
        (_axolotl, {"rl": "grpo"}, "grpo"),
        (_axolotl, {"reward_model": True}, "reward"),
        (_factory, {"stage": "kto"}, "kto"),
        (_factory, {"stage": "dpo", "pref_loss": "simpo"}, "simpo"),
        (_trl, {"beta": 0.1, "loss_type": "ipo"}, "ipo"),
    ):
        with pytest.raises(StudioError, match=word):
            carry(**settings)
    for script, word in (("GRPOTrainer(model)", "grpo"), ("RewardConfig(x)", "reward")):
        with pytest.raises(StudioError, match=word):
            carry_script(script, "it.py")


def test_what_cannot_be_said_in_a_recipe_is_told_and_matters() -> None:
    carrier = _axolotl(
        adapter=None, optimizer="muon", lr_scheduler="rex", lora_target_modules="model.*q_proj", adam_beta2=0.95,
        warmup_steps=5, neftune_noise_alpha=5, deepspeed="zero2.json", lora_r=4096, load_in_8bit=True,
    )  # fmt: skip
    told = _left(carrier)
    assert set(told) == {
        "adapter", "optimizer", "lr_scheduler", "lora_target_modules", "adam_beta2", "warmup_steps",
        "neftune_noise_alpha", "deepspeed", "lora_r",
    }  # fmt: skip
    assert all(matters for _, matters in told.values())
    assert "1 to 1024" in told["lora_r"][0]
    assert _values(carrier, "method", "model.precision") == ("qlora", (("*", "int8"),))
    assert "activations stay in 16" in carrier.carried["model.precision"].note
    kept = _axolotl(load_in_4bit=True, bnb_config_kwargs={"llm_int8_skip_modules": ["lm_head", "model.layers.0"]})
    assert _values(kept, "model.precision") == ((("lm_head", "16bit"), ("model.layers.0", "16bit")),)
    odd = _axolotl(load_in_4bit=True, bnb_config_kwargs={"llm_int8_skip_modules": ["a b"]})
    assert "dotted names" in _left(odd)["bnb_config_kwargs: llm_int8_skip_modules"][0]
    four = _axolotl(
        load_in_4bit=True, bnb_config_kwargs={"bnb_4bit_use_double_quant": False, "bnb_4bit_quant_type": "fp4"}
    )
    assert _values(four, "method", "model.double_quant", "model.quant_type") == ("qlora", False, "fp4")
    assert _left(_axolotl(adam_beta2=0.999, bf16="auto", fsdp=None, weight_decay=0.0, report_to="none")) == {}


_UNSLOTH = """
from unsloth import FastLanguageModel
LENGTH, RANK = 2048, int(os.environ.get("RANK", "16"))
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/model", max_seq_length=LENGTH, load_in_4bit=True,
    token=secret())
model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=RANK * 2, use_gradient_checkpointing="unsloth",
    random_state=3407, target_modules=["q_proj"] + ["v_proj"], bias="none", loftq_config=None)
dataset = load_dataset("json", data_files={"train": f"{'rows'}.jsonl"}, split="train").map(written)
options = {"learning_rate": 2e-4, "optim": "adamw_8bit"}
trainer = SFTTrainer(model=model, train_dataset=dataset, dataset_text_field="text", max_seq_length=LENGTH,
    packing=False, args=SFTConfig(per_device_train_batch_size=2, max_steps=60, warmup_steps=6, fp16=not bf16(),
        **options, report_to="none"))
trainer = train_on_responses_only(trainer)
"""
_PEFT = """
parser.add_argument("--lr", type=float, default=5e-6)
parser.add_argument("--model-name", required=True)
class Wanted:
    rank: int = field(default=64)
args, wanted = parser.parse_args(), Wanted()
four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained("owner/model", quantization_config=four, torch_dtype=torch.bfloat16)
train, test = load_dataset("owner/pairs", split="train"), load_dataset("owner/pairs", split="test")
peft = LoraConfig(r=wanted.rank, lora_alpha=16, task_type="CAUSAL_LM", init_lora_weights="gaussian")
lr = args.lr
lr = lr * 2
DPOTrainer(model, args=DPOConfig(learning_rate=lr, beta=0.05, num_train_epochs=args.epochs), peft_config=peft)
"""


def test_a_script_of_unsloth_is_read() -> None:
    carrier = carry_script(_UNSLOTH, "it.py")
    assert carrier.tool == "Unsloth"
    assert _values(
        carrier, "model.base", "method", "adapter.rank", "adapter.alpha", "adapter.targets", "adapter.init",
        "train.seq_len", "train.micro_batch", "train.accumulation", "train.steps", "train.warmup_fraction",
        "train.learning_rate", "train.optimizer", "train.seed", "train.offload_checkpoints", "data.path",
        "data.answers_only", "model.dtype",
        "model.double_quant",
    ) == (
        "unsloth/model", "qlora", 16, 32.0, ("q_proj", "v_proj"), "default", 2048, 2, 1, 60, 0.1, 2e-4, "adamw_8bit",
        3407, True, "rows.jsonl", True, "auto", True,
    )  # fmt: skip
    carrier.leave_rest()
    assert list(_left(carrier)) == ["map"]


def test_a_script_of_peft_and_trl_is_read_with_its_defaults() -> None:
    carrier = carry_script(_PEFT, "it.py")
    assert _values(
        carrier, "model.base", "method", "model.dtype", "model.quant_type", "model.double_quant", "adapter.rank",
        "adapter.alpha", "adapter.init", "adapter.targets", "train.objective", "train.learning_rate", "train.beta",
        "train.seq_len", "data.path", "data.eval_path",
    ) == (
        "owner/model", "qlora", "bf16", "fp4", False, 64, 16.0, "gaussian", ("q_proj", "v_proj"), "dpo", 1e-5, 0.05,
        1024, "owner/pairs", "owner/pairs:test",
    )  # fmt: skip
    assert carrier.carried["adapter.targets"].note
    assert "only running the script" in _left(carrier)["num_train_epochs"][0]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1 + 2 * 3", 7),
        ("-2e-4", -2e-4),
        ("1 / 0", None),
        ("'a' 'b' + 'c'", "abc"),
        ("[1, two]", [1, 2]),
        ("config['deep']['lr']", 3),
        ("os.getenv('X', 5)", 5),
        ("os.getenv('X') or 6", 6),
        ("two if True else 4", 2),
        ("open('/etc/passwd').read()", None),
        ("__import__('os').system('false')", None),
        ("'x' * 10 ** 9", None),
        ("10 ** 10 ** 10", None),
        ("loop", None),
    ],
)
def test_only_what_is_written_in_a_script_is_known(written: str, value: Any) -> None:
    text = f"two = 2\nconfig = {{'deep': {{'lr': 3}}}}\nloop = [loop, loop]\nwanted(it={written})"
    (call,) = calls_of(text, {"wanted"}, "it.py")
    found = call.named["it"]
    assert found == value if value is not None else isinstance(found, Unread) or isinstance(found[0], Unread | list)


def test_a_script_that_grows_without_end_is_left_unread() -> None:
    lines = ["a0 = ['x'] * 10", *(f"a{n} = [{', '.join([f'a{n - 1}'] * 10)}]" for n in range(1, 18)), "wanted(it=a17)"]
    assert len(calls_of("\n".join(lines), {"wanted"}, "it.py")) == 1
    for text in ("(" * 20_000, "a = " + "-" * 20_000 + "1", "def f(", "\0"):
        with pytest.raises(BadInput):
            calls_of(f"wanted({text})", {"wanted"}, "it.py")


@pytest.mark.parametrize(
    "value", ["x", "3", -1, 10**400, float("inf"), [1], [[1]], {"a": {}}, [{"path": 3}], Unread("f()")]
)
def test_no_value_of_any_setting_raises(value: Any) -> None:
    for carry, keys in ((_axolotl, AXOLOTL), (_factory, LLAMA_FACTORY + TRAINER), (_trl, TRL + TRAINER)):
        all_of_it = {**dict.fromkeys((keys + " datasets test_datasets dataset_mixer").split(), value)}
        assert carry(**all_of_it).carried
        for one in ("rl", "stage", "beta", "pref_loss", "loss_type"):
            with suppress(StudioError):
                carry(**{one: value})
