"""TRL's settings, from its YAML or from a script's calls (`studio.core.foreign.script`); Unsloth's are among them."""

from collections.abc import Mapping
from typing import Any

from studio.core.foreign.carry import Carrier, Setting, as_number, as_switch, names_in
from studio.core.foreign.reasons import REASONS, Reason
from studio.core.foreign.rows import Rows, carry_held_out, carry_rows, with_split
from studio.core.foreign.training import (
    carry_adapter,
    carry_attention,
    carry_four_bits,
    carry_template,
    carry_training,
    refuse_objective,
)

OF_TRAINER: Mapping[str, Any] = {
    "train.micro_batch": 8,
    "train.accumulation": 1,
    "train.epochs": 3.0,
    "train.schedule": "linear",
    "train.warmup_fraction": 0.0,
    "train.learning_rate": 5e-5,
    "train.checkpoint_every": 500,
    "train.recompute": "none",
    "train.group_by_length": False,
    "train.seed": 42,
}
"""What transformers' TrainingArguments do where nothing is said."""
OF_TRL: Mapping[str, Any] = {
    **OF_TRAINER,
    "train.learning_rate": 2e-5,
    "train.recompute": "all",
    "train.seq_len": 1024,
}
OF_PAIRS: Mapping[str, Any] = {**OF_TRL, "train.learning_rate": 1e-6, "train.beta": 0.1}
OF_PEFT: Mapping[str, Any] = {"adapter.rank": 8, "adapter.alpha": 8.0, "adapter.dropout": 0.0}
OF_MODEL_CONFIG: Mapping[str, Any] = {"adapter.rank": 16, "adapter.alpha": 32.0, "adapter.dropout": 0.05}
OF_UNSLOTH: Mapping[str, Any] = {
    "adapter.rank": 16,
    "adapter.alpha": 16.0,
    "adapter.dropout": 0.0,
    "adapter.targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "method": "qlora",
    "train.seq_len": 2048,
}
_OFTEN = "what peft chooses for most families"
_REASONS = (
    Reason(
        "loss over tokens is a mean over the step here",
        "loss_type average_tokens_across_devices",
    ),
    Reason(
        "a file or a script says one training",
        "dataset_streaming dataset_configs config dataset_shuffle* benchmark*",
    ),
)
_MIXTURE = ("path", "config", "name", "split", "weight", "columns", "revision", "data_dir", "data_files")


def carry_trl(carrier: Carrier, defaults: Mapping[str, Any], *, objective: str = "") -> None:
    """Carry TRL's settings.

    Args:
        carrier: The settings, by the names of TRL's YAML.
        defaults: What the tool does where nothing is said, by field of the recipe.
        objective: What is trained, where a script says it; empty to find out.

    Raises:
        StudioError: It trains what this program does not.
    """
    _objective(carrier, objective)
    carrier.move("model_name_or_path", "model.base")
    if (revision := carrier.take("model_revision")) and revision.value != "main":
        carrier.put("model.revision", revision.value, revision)
    if trusted := carrier.take("trust_remote_code"):
        carrier.put("model.trust_remote_code", as_switch(trusted.value), trusted)
    carrier.put("method", defaults.get("method", "lora"))
    if (four := carrier.open.get("load_in_4bit")) and as_switch(four.value) is False:
        carrier.put("method", "lora", carrier.take("load_in_4bit"))
    _whole_weights(carrier)
    carry_four_bits(carrier)
    carry_adapter(carrier)
    way = carrier.take("attn_implementation")
    carry_attention(carrier, way, getattr(way, "value", None))
    if (flash := carrier.take("use_flash_attention_2")) and as_switch(flash.value) is True:
        carry_attention(carrier, flash, "flash_attention_2")
    for name in ("max_length", "max_seq_length", "max_completion_length"):
        carrier.move(name, "train.seq_len")
    _packing(carrier)
    _learnt(carrier)
    if template := carrier.take("chat_template"):
        carry_template(carrier, template, template.value)
    if template := carrier.take("chat_template_path"):
        carrier.put("data.template", template.value, template)
    _data(carrier)
    carry_held_out(carrier, "test_size")
    carry_training(carrier, defaults)
    if "adapter.targets" not in carrier.carried and "lora_target_modules" not in {
        one.setting.key for one in carrier.left
    }:
        carrier.otherwise("adapter.targets", ("q_proj", "v_proj"), _OFTEN)
    carrier.leave_known((*_REASONS, *REASONS))


def _objective(carrier: Carrier, word: str) -> None:
    kind = word or ("dpo" if {"beta", "ref_model"} & set(carrier.open) else "sft")
    if kind not in ("sft", "dpo", "orpo"):
        raise refuse_objective(carrier.tool, kind)
    if kind == "sft":
        return
    carrier.put("train.objective", kind)
    carrier.move("beta", "train.beta")
    loss, smoothed = carrier.take("loss_type"), carrier.take("label_smoothing")
    word = str(loss.value) if loss else "sigmoid"
    if kind == "dpo" and word not in ("sigmoid", "robust", "['sigmoid']", "['robust']"):
        raise refuse_objective(carrier.tool, f"the {word} loss")
    if smoothed and as_number(smoothed.value):
        if "robust" in word:
            carrier.put("train.label_smoothing", smoothed.value, smoothed)
        else:
            carrier.leave(smoothed, "that is conservative DPO; train.label_smoothing is robust DPO, another loss")


def _whole_weights(carrier: Carrier) -> None:
    peft = carrier.take("use_peft")
    whole = carrier.take("full_finetuning")
    given = whole if whole and as_switch(whole.value) is True else None
    if peft is not None and as_switch(peft.value) is not True:
        given = peft
    if given:
        carrier.leave(
            given, "weights are trained through LoRA alone: a rate for all weights is about ten times too low"
        )


def _packing(carrier: Carrier) -> None:
    packed = carrier.take("packing")
    if packed and as_switch(packed.value) is True:
        note = "there a row of a step is full of rows; here rows are counted: raise train.accumulation"
        carrier.put("train.packing", "on", packed, note)


def _learnt(carrier: Carrier) -> None:
    """Carry what is learnt: TRL learns whole conversations where nothing is said, and the answer of a prompt."""
    only = carrier.take("assistant_only_loss") or carrier.take("train_on_responses_only")
    part = carrier.take("completion_only_loss")
    if only and as_switch(only.value) is True:
        carrier.put("data.answers_only", True, only)
    elif part is not None:
        carrier.put("data.answers_only", as_switch(part.value) is not False, part)
    column, code = carrier.take("dataset_text_field"), carrier.take("formatting_func")
    if code:
        carrier.leave(code, "rows are read as they are and written by the chat template; data.prompt writes a prompt")
    elif column is not None and column.value != "text":
        carrier.put("data.columns", {"text": column.value}, column)
    if "data.answers_only" not in carrier.carried and "train.objective" not in carrier.carried:
        note = "all of a conversation is learnt there, the user's turns too; true learns the answers alone"
        carrier.put("data.answers_only", False, column, note)


def _data(carrier: Carrier) -> None:
    named = carrier.take("dataset_name")
    config, split = (
        carrier.take("dataset_config") or carrier.take("dataset_config_name"),
        carrier.take("dataset_train_split"),
    )
    mixture = carrier.take("dataset_mixture") or carrier.take("datasets") or carrier.take("dataset_mixer")
    if named:
        rows = Rows(str(named.value), str(config.value) if config else "")
        carry_rows(carrier, named, [with_split(carrier, rows, split)])
    elif mixture:
        mixed = _mixed(carrier, mixture)
        splits = carrier.take("dataset_splits")
        names = names_in(splits.value) or [] if splits else []
        of_training = [name for name in names if not name.startswith(("test", "val"))]
        for one in mixed if of_training else ():
            one.split = of_training[0]
        carry_rows(carrier, mixture, mixed)
        if mixed and (held := [name for name in names if name not in of_training]):
            carrier.put("data.eval_path", Rows(mixed[0].path, mixed[0].config, held[0]).word, splits)
    if (test := carrier.take("dataset_test_split")) and named:
        carrier.put("data.eval_path", Rows(str(named.value), split=str(test.value)).word, test)
    for name in ("dataset_splits", "test_split_size"):
        if given := carrier.take(name):
            carrier.leave(given, "held-out rows are counted here: eval.rows; another split stands in data.eval_path")


def _mixed(carrier: Carrier, given: Setting) -> list[Rows]:
    """Return the data sets of a mixture: a list of tables, or the handbook's names with their shares."""
    told = given.value
    if isinstance(told, Mapping) and "datasets" in told:
        told = told["datasets"]
    if isinstance(told, Mapping):
        shares = [as_number(share) for share in told.values()]
        if any(share != 1 for share in shares):
            carrier.leave(
                given, "shares of each data set are taken there; here weights share out a mixture", matters=True
            )
        return [Rows(str(name)) for name in told]
    rows = []
    for table in told if isinstance(told, list) else []:
        if isinstance(table, Mapping) and (path := table.get("path") or table.get("id")):
            split = Setting(f"{given.key}: split", table.get("split", ""), given.line)
            one = Rows(str(path), str(table.get("config") or table.get("name") or ""))
            rows.append(with_split(carrier, one, split))
            unknown = [key for key in table if key not in (*_MIXTURE, "id")]
            if unknown or table.get("weight") not in (None, 1, 1.0):
                carrier.leave(Setting(given.key, path, given.line), "its share is not taken over")
    return rows
