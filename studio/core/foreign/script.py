"""A training script of TRL, Unsloth or transformers with peft, as the settings that its calls give.

Its calls are brought to the names of TRL's YAML (`LoraConfig(r=16)` is `lora_r`), so that one module carries both. What
a script does to its rows is code: it is told, and the rows are read as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from studio.core.errors import BadInput
from studio.core.foreign.carry import Carrier, Setting, Unread, is_nothing
from studio.core.foreign.python_calls import Call, calls_of
from studio.core.foreign.training import refuse_objective
from studio.core.foreign.trl import OF_PAIRS, OF_PEFT, OF_TRAINER, OF_TRL, OF_UNSLOTH, carry_trl

_CONFIGS = {
    "TrainingArguments": "sft",
    "UnslothTrainingArguments": "sft",
    "SFTConfig": "sft",
    "DPOConfig": "dpo",
    "ORPOConfig": "orpo",
    "KTOConfig": "kto",
    "GRPOConfig": "grpo",
    "PPOConfig": "ppo",
    "CPOConfig": "cpo",
    "RewardConfig": "a reward model",
    "RLOOConfig": "rloo",
    "Seq2SeqTrainingArguments": "an encoder and a decoder",
    "SentenceTransformerTrainingArguments": "embeddings",
}
_TRAINERS = {
    "Trainer": "sft",
    "SFTTrainer": "sft",
    "UnslothTrainer": "sft",
    "DPOTrainer": "dpo",
    "ORPOTrainer": "orpo",
    "KTOTrainer": "kto",
    "GRPOTrainer": "grpo",
    "PPOTrainer": "ppo",
    "CPOTrainer": "cpo",
    "RewardTrainer": "a reward model",
    "SentenceTransformerTrainer": "embeddings",
}
_UNSLOTH = ("FastLanguageModel", "FastModel", "FastVisionModel", "FastSentenceTransformer")
_ADAPTER = {
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
}
_ALONE = ("train_on_responses_only", "DataCollatorForCompletionOnlyLM")
_WANTED = frozenset(
    (
        *_CONFIGS,
        *_TRAINERS,
        *_ALONE,
        "from_pretrained",
        "get_peft_model",
        "LoraConfig",
        "BitsAndBytesConfig",
        "load_dataset",
        "get_chat_template",
        "train_test_split",
        "map",
        "from_list",
        "from_dict",
        "from_pandas",
    )
)
_OF_TRAINER = (
    "model", "args", "train_dataset", "eval_dataset", "tokenizer", "processing_class", "data_collator", "peft_config",
    "callbacks", "compute_metrics", "ref_model",
)  # fmt: skip
"""Arguments of a trainer that are objects: what they were made of is read where they were made."""


def carry_script(text: str, shown: str) -> Carrier:
    """Carry a script.

    Args:
        text: The script.
        shown: Its name, for messages.

    Returns:
        What was carried and what was not.

    Raises:
        BadInput: It is no Python, or nothing in it trains a model.
        StudioError: It trains what this program does not.
    """
    calls = calls_of(text, _WANTED, shown)
    trainers = [call for call in calls if call.last in _TRAINERS]
    configs = [call for call in calls if call.last in _CONFIGS]
    if not trainers and not configs:
        raise BadInput(f"{shown} calls no trainer of TRL, Unsloth or transformers: there is nothing to carry over.")
    told = {_TRAINERS[call.last] for call in trainers} or {_CONFIGS[call.last] for call in configs}
    known = [word for word in ("dpo", "orpo", "sft") if word in told]
    tool = "Unsloth" if any(call.name.startswith(_UNSLOTH) for call in calls) else "TRL"
    if not known or (known == ["sft"] and len(told) > 1):
        raise refuse_objective(tool, next(iter(sorted(told - {"sft"}))))
    settings: dict[str, Setting] = {}
    defaults = _model(calls, settings)
    defaults = {**_arguments(trainers, configs, known[0], settings), **defaults}
    for call in calls:
        if call.last == "get_peft_model":
            _give(settings, "seed", call.named.get("random_state"), call, "random_state")
    _data(calls, settings)
    carrier = Carrier(tool, settings)
    _code(carrier, calls)
    carry_trl(carrier, defaults, objective=known[0])
    return carrier


def _model(calls: Sequence[Call], settings: dict[str, Setting]) -> dict[str, Any]:
    """Take what is said of the base and of the adapter, and return what is done where nothing is said."""
    defaults: dict[str, Any] = {}
    unsloth = next((call for call in calls if call.last == "from_pretrained" and call.name.startswith(_UNSLOTH)), None)
    base = unsloth or next((call for call in calls if _loads_model(call)), None)
    if base:
        _give(
            settings,
            "model_name_or_path",
            base.argument(0, "model_name", "pretrained_model_name_or_path"),
            base,
            "model",
        )
        skipped = ("model_name", "pretrained_model_name_or_path", "quantization_config", "token", "config")
        rename = {"revision": "model_revision"}
        _give_all(settings, base, rename, skipped)
    quantised = next((call for call in calls if call.last == "BitsAndBytesConfig"), None)
    if quantised:
        _give_all(settings, quantised, {}, ())
        defaults |= {"model.quant_type": "fp4", "model.double_quant": False}
    for call in calls:
        if call.last == "LoraConfig" or (call.last == "get_peft_model" and call.name.startswith(_UNSLOTH)):
            if call.last == "LoraConfig":
                defaults |= OF_PEFT
            _give_all(settings, call, _ADAPTER, ("max_seq_length", "random_state", "model", "peft_type"))
    if unsloth:
        defaults = {**OF_UNSLOTH, **defaults}
    return defaults


def _loads_model(call: Call) -> bool:
    return call.last == "from_pretrained" and call.name.rpartition(".")[0].rpartition(".")[2].endswith(
        ("LM", "ForConditionalGeneration")
    )


def _arguments(
    trainers: Sequence[Call], configs: Sequence[Call], objective: str, settings: dict[str, Setting]
) -> Mapping[str, Any]:
    """Take what the trainer and its arguments say; return what they do where nothing is said."""
    config = next((call for call in configs if _CONFIGS[call.last] == objective), configs[0] if configs else None)
    if config:
        _give_all(settings, config, {}, ("output_dir",))
    trainer = trainers[0] if trainers else None
    if trainer:
        model = trainer.argument(0, "model")
        if isinstance(model, str) and "model_name_or_path" not in settings:
            _give(settings, "model_name_or_path", model, trainer, "model")
        _give_all(settings, trainer, {}, _OF_TRAINER)
    of_trl = config is None or config.last.endswith("Config")
    return OF_PAIRS if objective in ("dpo", "orpo") else OF_TRL if of_trl else OF_TRAINER


def _data(calls: Sequence[Call], settings: dict[str, Setting]) -> None:
    """Take what data is loaded: the first data set, and the second one where it is another split of it."""
    loads = [call for call in calls if call.last == "load_dataset"]
    if not loads:
        return
    first = loads[0]
    name, config = first.argument(0, "path"), first.argument(1, "name")
    files = first.named.get("data_files")
    if isinstance(files, dict):
        files = files.get("train", next(iter(files.values()), None))
    files = files[0] if isinstance(files, list) and files else files
    _give(settings, "dataset_name", name if files is None else files, first, "load_dataset")
    _give(settings, "dataset_config", config, first, "load_dataset: name")
    _give(settings, "dataset_train_split", first.named.get("split"), first, "load_dataset: split")
    for later in loads[1:]:
        split = later.named.get("split")
        if later.argument(0, "path") == name and isinstance(split, str) and split != first.named.get("split"):
            _give(settings, "dataset_test_split", split, later, "load_dataset: split")
            break
    cut = next((call for call in calls if call.last == "train_test_split"), None)
    if cut:
        _give(settings, "test_size", cut.argument(0, "test_size"), cut, "test_size")


def _code(carrier: Carrier, calls: Sequence[Call]) -> None:
    """Take what is done by code to the rows and to what is learnt of them."""
    for call in calls:
        if call.last in _ALONE:
            carrier.open["train_on_responses_only"] = Setting(call.last, True, call.line)
        elif call.last == "get_chat_template":
            word = call.argument(1, "chat_template")
            carrier.open["chat_template"] = Setting("get_chat_template", word, call.line)
        elif call.last == "map" and call.positional and "formatting_func" not in carrier.open:
            carrier.open["formatting_func"] = Setting("map", call.positional[0], call.line)
        elif call.last in ("from_list", "from_dict", "from_pandas") and "dataset_name" not in carrier.open:
            setting = Setting(call.name, Unread("rows made by the script"), call.line)
            carrier.leave(setting, "write them into a file and give --data")


def _give(settings: dict[str, Setting], name: str, value: Any, call: Call, shown: str = "") -> None:
    """Keep a setting; the first one of a name counts."""
    if not is_nothing(value) and name not in settings:
        settings[name] = Setting(shown or name, value, call.line)


def _give_all(settings: dict[str, Setting], call: Call, names: Mapping[str, str], without: Sequence[str]) -> None:
    for key, value in call.named.items():
        if key not in without:
            _give(settings, names.get(key, key), value, call, key)
