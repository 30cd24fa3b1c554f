"""Axolotl's YAML: its own names for the training, and data sets that say how their rows become a prompt."""

from collections.abc import Mapping
from typing import Any

from studio.core.foreign.carry import Carrier, Setting, as_number, as_switch, is_nothing, names_in
from studio.core.foreign.reasons import REASONS, Reason
from studio.core.foreign.rows import Rows, carry_held_out, carry_rows, with_split
from studio.core.foreign.training import (
    OWN_TEMPLATE,
    carry_adapter,
    carry_attention,
    carry_four_bits,
    carry_template,
    carry_training,
    refuse_objective,
)

_NAMES = {
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "init_lora_weights": "peft_init_lora_weights",
    "layers_to_transform": "peft_layers_to_transform",
}
_DEFAULTS = {
    "train.micro_batch": 1,
    "train.accumulation": 1,
    "train.epochs": 1.0,
    "train.schedule": "cosine",
    "train.warmup_fraction": 0.03,
    "train.recompute": "none",
    "train.group_by_length": False,
    "train.seed": 42,
    "train.seq_len": 512,
    "adapter.dropout": 0.0,
    "data.answers_only": True,
}
_REASONS = (
    Reason(
        "a 4-bit base is NF4 by bitsandbytes here",
        "peft gptq quantize_moe_experts model_quantization_config*",
        matters=True,
    ),
    Reason(
        "8-bit and 4-bit training of the weights themselves has no place here",
        "qat quantization fp8 fp8_*",
        matters=True,
    ),
    Reason(
        "data is read as it is, each time",
        "dataset_shard_* dataset_exact_deduplication dataloader_drop_last",
    ),
    Reason(
        "rows of every length are used",
        "min_sample_len sample_packing_sequentially curriculum_sampling",
        matters=True,
    ),
    Reason(
        "one file says one training",
        "vllm axolotl_config_path inference is_preprocess experimental_* pretrain_* pretraining_sample_concatenation",
    ),
)
_PROMPTS = {"alpaca": "alpaca", "alpaca_w_system": "alpaca", "gpteacher": "alpaca", "reflection": "alpaca"}
_MESSAGES = ("chat_template", "sharegpt", "messages", "chatml", "llama3", "tokenizer_default")
_ROW_REASON = "how rows of this type are written as a prompt is not known here: data.columns and data.prompt say it"


def carry_axolotl(carrier: Carrier) -> None:
    """Carry an axolotl configuration.

    Raises:
        StudioError: It trains what this program does not.
    """
    carrier.names = _NAMES
    objective = _objective(carrier)
    carrier.move("base_model", "model.base")
    carrier.move("revision_of_model", "model.revision")
    carrier.move("model_revision", "model.revision")
    if trusted := carrier.take("trust_remote_code"):
        carrier.put("model.trust_remote_code", as_switch(trusted.value), trusted)
    _method(carrier)
    carry_adapter(carrier)
    _batch(carrier)
    carrier.move("sequence_len", "train.seq_len")
    _packing(carrier)
    attention = carrier.take("attn_implementation")
    carry_attention(carrier, attention, getattr(attention, "value", None))
    for name, word in (
        ("flash_attention", "flash_attention_2"),
        ("sdp_attention", "sdpa"),
        ("eager_attention", "eager"),
        ("xformers_attention", "xformers"),
        ("flex_attention", "flex"),
    ):
        given = carrier.take(name)
        if given and as_switch(given.value) is True:
            carry_attention(carrier, given, word)
    if inputs := carrier.take("train_on_inputs"):
        carrier.put("data.answers_only", as_switch(inputs.value) is not True, inputs)
    template = _template(carrier)
    _data(carrier, template, pairs=objective != "sft")
    carry_held_out(carrier, "val_set_size")
    _plugins(carrier)
    carry_training(carrier, _DEFAULTS)
    carrier.leave_known((*_REASONS, *REASONS))


def _objective(carrier: Carrier) -> str:
    """Return what the file trains."""
    for name in ("reward_model", "process_reward_model"):
        if carrier.value(name):
            raise refuse_objective(carrier.tool, "a reward model")
    kind = carrier.take("rl")
    beta, weight = carrier.take("rl_beta") or carrier.take("dpo_beta"), carrier.take("orpo_alpha")
    if kind is None:
        return "sft"
    word = str(kind.value)
    if word not in ("dpo", "orpo"):
        raise refuse_objective(carrier.tool, word)
    carrier.put("train.objective", word, kind)
    if used := (beta if word == "dpo" else weight or beta):
        carrier.put("train.beta", used.value, used)
    return word


def _method(carrier: Carrier) -> None:
    adapter = carrier.take("adapter")
    if adapter and adapter.value in ("lora", "qlora"):
        carrier.put("method", adapter.value, adapter)
    else:
        given = adapter or Setting("adapter", None)
        carrier.leave(
            given, "weights are trained through LoRA alone: a rate for all weights is about ten times too low"
        )
        carrier.put("method", "lora")
    details = carrier.take("bnb_config_kwargs")
    for name, value in details.value.items() if details and isinstance(details.value, Mapping) else ():
        carrier.open[str(name)] = Setting(f"bnb_config_kwargs: {name}", value, details.line if details else 0)
    carry_four_bits(carrier)


def _batch(carrier: Carrier) -> None:
    """Carry the rows of a step, of which two numbers of three are given."""
    whole = carrier.take("batch_size")
    one, parts = carrier.open.get("micro_batch_size"), carrier.open.get("gradient_accumulation_steps")
    if whole and (one is None or is_nothing(one.value)) and parts and isinstance(parts.value, int):
        carrier.put("train.micro_batch", max(1, int(as_number(whole.value)) // max(1, parts.value)), whole)
    elif whole and one and isinstance(one.value, int) and (parts is None or is_nothing(parts.value)):
        carrier.put("train.accumulation", max(1, int(as_number(whole.value)) // max(1, one.value)), whole)


def _packing(carrier: Carrier) -> None:
    packed = carrier.take("sample_packing")
    if packed and as_switch(packed.value) is True:
        length = carrier.carried.get("train.seq_len")
        note = f"there a row of a step is {length.value if length else 512} tokens full of rows; here rows are counted"
        carrier.put("train.packing", "on", packed, f"{note}: raise train.accumulation")


def _template(carrier: Carrier) -> str:
    """Carry the template for all data sets, and return its name."""
    given, text = carrier.take("chat_template"), carrier.take("chat_template_jinja")
    carrier.take("default_system_message")
    if text:
        carrier.leave(text, "put it into a file and name that in data.template")
    if given is None:
        return ""
    word = str(given.value).removeprefix("tokenizer_default_fallback_")
    if word not in ("tokenizer_default", "jinja"):
        carry_template(carrier, given, word)
    return word


def _data(carrier: Carrier, template: str, *, pairs: bool) -> None:
    named = carrier.take("datasets")
    raw = carrier.take("pretraining_dataset")
    for given in (named, raw):
        tables = given.value if given and isinstance(given.value, list) else [given.value] if given else []
        rows = [_rows(carrier, given, table, raw=given is raw, pairs=pairs) for table in tables]  # type: ignore[arg-type]
        if given and rows:
            carry_rows(carrier, given, [one for one in rows if one])
    tests = carrier.take("test_datasets")
    if tests and isinstance(tests.value, list) and tests.value and isinstance(tests.value[0], Mapping):
        first = _rows(carrier, tests, tests.value[0], raw=False, pairs=pairs)
        if first:
            carrier.put("data.eval_path", first.word, tests, "the first of them" if len(tests.value) > 1 else "")


def _rows(carrier: Carrier, given: Setting, table: Any, *, raw: bool, pairs: bool) -> Rows | None:
    """Return what one entry of `datasets` says, and tell what of it has no place."""
    if isinstance(table, str):
        table = {"path": table}
    if not isinstance(table, Mapping):
        return None
    said = {str(key): value for key, value in table.items() if not is_nothing(value)}
    kind = said.pop("type", "")
    split = Setting(f"{given.key}: split", said.pop("split", ""), given.line)
    files = names_in(said.pop("data_files", ""))
    word = files[0] if files else str(said.pop("path", ""))
    said.pop("path", None)
    rows = Rows(word, config=str(said.pop("name", "")), revision=str(said.pop("revision", "")))
    if not files:
        with_split(carrier, rows, split)
    if files and len(files) > 1:
        carrier.leave(
            Setting(f"{given.key}: data_files", files[1:], given.line), "one file of each: name them in data.sources"
        )
    rows = _columns(rows, said, kind, raw=raw, pairs=pairs)
    if isinstance(kind, str) and not raw:
        _kind(carrier, given, kind)
    elif isinstance(kind, Mapping) and (form := kind.get("format")):
        carrier.leave(
            Setting(f"{given.key}: format", form, given.line), f"{OWN_TEMPLATE}, with the prompt as a user's turn"
        )
    for key, value in said.items():
        if key in ("ds_type", "trust_remote_code", "shards", "shards_idx", "preprocess_shards", "chat_template_jinja"):
            continue
        if key == "chat_template":
            word = str(value).removeprefix("tokenizer_default_fallback_")
            if word != "tokenizer_default" and "data.template" not in carrier.carried:
                carry_template(carrier, Setting(f"{given.key}: chat_template", value, given.line), word)
        elif (key, value) not in (("roles_to_train", ["assistant"]), ("train_on_eos", "turn")):
            carrier.leave(
                Setting(f"{given.key}: {key}", value, given.line), "data.columns and data.learn say such things"
            )
    return rows


def _columns(rows: Rows, said: dict[str, Any], kind: Any, *, raw: bool, pairs: bool) -> Rows:
    """Return the rows with the columns that an entry names, which are taken out of it."""
    columns: dict[str, str] = {}
    if raw or (isinstance(kind, str) and kind.partition(".")[0] in ("completion", "pretrain")):
        columns["text"] = str(said.pop("text_column", said.pop("field", "text")))
        rows.format = "text"
    elif isinstance(kind, Mapping):
        names = {
            "field_system": "system",
            "field_instruction": "instruction",
            "field_input": "input",
            "field_output": "completion",
            "field_prompt": "prompt",
            "field_chosen": "chosen",
            "field_rejected": "rejected",
        }
        columns |= {ours: str(kind[theirs]) for theirs, ours in names.items() if kind.get(theirs)}
    elif isinstance(kind, str) and kind.partition(".")[0].partition(":")[0] in _PROMPTS and not pairs:
        rows.format = "alpaca"
    for theirs, ours in (("field_messages", "messages"), ("field_tools", "tools"), ("field_thinking", "reasoning")):
        if theirs in said:
            columns[ours] = str(said.pop(theirs))
    if pairs:
        for theirs, ours in (("field_chosen", "chosen"), ("field_rejected", "rejected"), ("field_prompt", "prompt")):
            if theirs in said:
                columns[ours] = str(said.pop(theirs))
    of_message = said.pop("message_property_mappings", None) or {}
    role = of_message.get("role") or said.pop("message_field_role", None)
    content = of_message.get("content") or said.pop("message_field_content", None)
    said.pop("message_field_role", None), said.pop("message_field_content", None)
    columns |= {ours: str(name) for ours, name in (("role", role), ("content", content)) if name}
    roles = said.pop("roles", None)
    for ours in ("user", "assistant") if isinstance(roles, Mapping) else ():
        words = roles.get(ours)
        if isinstance(words, list) and len(words) == 1:
            columns[ours] = str(words[0])
    rows.columns = columns
    return rows


def _kind(carrier: Carrier, given: Setting, kind: str) -> None:
    """Tell a type of rows whose prompt is another one here, and name the template that makes the same."""
    name = kind.partition(".")[0].partition(":")[0]
    one = Setting(f"{given.key}: type", kind, given.line)
    if name in _PROMPTS:
        if "data.template" not in carrier.carried:
            carrier.put("data.template", _PROMPTS[name], one, "one prompt for rows with and without an input")
    elif name in ("chatml", "llama3") and "data.template" not in carrier.carried:
        carrier.put("data.template", name, one)
    elif name and name not in (*_MESSAGES, "completion", "pretrain", "user_defined"):
        carrier.leave(one, _ROW_REASON)


def _plugins(carrier: Carrier) -> None:
    """Pass over plugins that only change how fast the same is computed."""
    plugins = carrier.take("plugins")
    names = names_in(plugins.value) if plugins else None
    if plugins and names:
        kernels = ("liger", "cut_cross_entropy", "kernels")
        other = [name for name in names if not any(kernel in name.lower() for kernel in kernels)]
        if other:
            carrier.leave(Setting(plugins.key, other, plugins.line), "plugins of axolotl do not run here")
