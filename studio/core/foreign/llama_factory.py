"""LLaMA-Factory's YAML or JSON, and its `dataset_info.json`, which says where a data set's name leads."""

from collections.abc import Mapping
from typing import Any

from studio.core.foreign.carry import Carrier, Setting, as_number, as_switch, names_in
from studio.core.foreign.reasons import REASONS, Reason
from studio.core.foreign.rows import Rows, carry_held_out, carry_rows, with_split
from studio.core.foreign.training import (
    carry_adapter,
    carry_attention,
    carry_precision,
    carry_template,
    carry_training,
    refuse_objective,
)
from studio.core.value_kinds import ALL_LINEAR

_NAMES = {
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target",
    "lora_modules_to_save": "additional_target",
    "bnb_4bit_quant_type": "quantization_type",
    "bnb_4bit_use_double_quant": "double_quantization",
}
_DEFAULTS: Mapping[str, Any] = {
    "adapter.rank": 8,
    "adapter.targets": ALL_LINEAR,
    "adapter.dropout": 0.0,
    "train.micro_batch": 8,
    "train.accumulation": 1,
    "train.learning_rate": 5e-5,
    "train.epochs": 3.0,
    "train.schedule": "linear",
    "train.warmup_fraction": 0.0,
    "train.recompute": "all",
    "train.group_by_length": False,
    "train.checkpoint_every": 500,
    "train.seq_len": 2048,
    "train.seed": 42,
}
_REASONS = (
    Reason(
        "QLoRA holds a base in 4 bits by bitsandbytes here",
        "fp8 fp8_* quantization_*",
        matters=True,
    ),
    Reason(
        "adapters are LoRA here",
        "freeze_* oft_* use_oft module_dropout use_galore galore_* use_apollo apollo_* use_badam badam_* "
        "use_adam_mini use_muon use_mca lora_ga* use_eaft* use_asft*",
        matters=True,
    ),
    Reason(
        "calls of tools are written as the model's own template does",
        "tool_format",
        matters=True,
    ),
    Reason(
        "the template's words are data.template_kwargs",
        "default_system thinking_template",
        matters=True,
    ),
    Reason(
        "one run at a time is said by a file",
        "ppo_* reward_model* create_new_adapter split_special_tokens tool_*",
    ),
    Reason(
        "answers are made by `lora-studio chat` and by a run's samples",
        "max_new_tokens top_p top_k temperature eval_num_beams",
    ),
)
_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "completion",
    "history": "history",
    "system": "system",
    "tools": "tools",
    "messages": "messages",
    "chosen": "chosen",
    "rejected": "rejected",
}
_PICTURES = ("images", "videos", "audios")


def carry_llama_factory(carrier: Carrier, infos: Mapping[str, Any] | None, folder: str) -> None:
    """Carry a LLaMA-Factory configuration.

    Args:
        carrier: The settings.
        infos: What `dataset_info.json` says; None where it was not found.
        folder: The folder of data sets.

    Raises:
        StudioError: It trains what this program does not.
    """
    carrier.names = _NAMES
    raw = _objective(carrier)
    carrier.move("model_name_or_path", "model.base")
    if (revision := carrier.take("model_revision")) and revision.value != "main":
        carrier.put("model.revision", revision.value, revision)
    if trusted := carrier.take("trust_remote_code"):
        carrier.put("model.trust_remote_code", as_switch(trusted.value), trusted)
    _method(carrier)
    carry_adapter(carrier)
    rank = carrier.carried.get("adapter.rank")
    carrier.otherwise("adapter.alpha", 2.0 * (rank.value if rank else _DEFAULTS["adapter.rank"]), "twice the rank")
    if (pissa := carrier.take("pissa_init")) and as_switch(pissa.value) is True:
        carrier.put("adapter.init", "pissa", pissa, "by an exact decomposition, not by iterations")
    carrier.move("cutoff_len", "train.seq_len")
    _learnt(carrier)
    way = carrier.take("flash_attn")
    words = {"fa2": "flash_attention_2", "disabled": "eager"}
    carry_attention(carrier, way, words.get(str(way.value), str(way.value)) if way else None)
    if (template := carrier.take("template")) is not None:
        carry_template(carrier, template, template.value)
    if (thinks := carrier.take("enable_thinking")) is not None:
        carrier.put("data.template_kwargs", {"enable_thinking": as_switch(thinks.value)}, thinks)
    _data(carrier, infos, folder, raw=raw)
    carry_held_out(carrier, "val_size")
    carry_training(carrier, _DEFAULTS)
    carrier.leave_known((*_REASONS, *REASONS))


def _objective(carrier: Carrier) -> bool:
    """Carry what is trained, and return whether it is plain text."""
    stage = carrier.take("stage")
    word = str(stage.value) if stage else "sft"
    loss, beta = carrier.take("pref_loss"), carrier.take("pref_beta")
    smoothed = carrier.take("dpo_label_smoothing")
    if word == "dpo":
        kind = {"sigmoid": "dpo", "orpo": "orpo"}.get(str(loss.value) if loss else "sigmoid")
        if kind is None:
            raise refuse_objective(carrier.tool, f"the {loss.value if loss else ''} loss")
        carrier.put("train.objective", kind, loss or stage)
        if beta:
            carrier.put("train.beta", beta.value, beta)
        else:
            carrier.otherwise("train.beta", 0.1)
        if smoothed and as_number(smoothed.value):
            carrier.leave(smoothed, "that is conservative DPO; train.label_smoothing is robust DPO, another loss")
    elif word not in ("sft", "pt"):
        raise refuse_objective(carrier.tool, {"rm": "a reward model"}.get(word, word))
    return word == "pt"


def _method(carrier: Carrier) -> None:
    kind = carrier.take("finetuning_type")
    if kind and kind.value != "lora":
        carrier.leave(kind, "weights are trained through LoRA alone: a rate for all weights is about ten times too low")
    bits, by = carrier.take("quantization_bit"), carrier.take("quantization_method")
    details = {
        "model.quant_type": carrier.take("bnb_4bit_quant_type"),
        "model.double_quant": carrier.take("bnb_4bit_use_double_quant"),
    }
    if bits is None:
        carrier.put("method", "lora", kind)
    elif as_number(bits.value) == 4:
        other = by is not None and str(by.value) not in ("bnb", "bitsandbytes")
        carrier.put("method", "qlora", bits, f"by bitsandbytes, not {by.value}" if other and by else "")
        for path, given in details.items():
            if given is not None:
                carrier.put(path, given.value, given)
    elif as_number(bits.value) == 8:
        carrier.put("method", "qlora", bits, "held as model.precision says")
        carry_precision(carrier, bits)
    else:
        carrier.put("method", "lora", bits, "the base is held in 16 bits; qlora holds it in 4")


def _learnt(carrier: Carrier) -> None:
    whole, last = carrier.take("train_on_prompt"), carrier.take("mask_history")
    if whole:
        carrier.put("data.answers_only", as_switch(whole.value) is not True, whole)
    if last:
        carrier.put("data.last_answer_only", as_switch(last.value) is True, last)
    packed, apart = carrier.take("packing"), carrier.take("neat_packing")
    given = next((one for one in (apart, packed) if one and as_switch(one.value) is True), None)
    if given:
        note = "there a row of a step is full of rows; here rows are counted: raise train.accumulation"
        carrier.put(
            "train.packing", "on", given, note if given is apart else f"packed rows do not see each other here; {note}"
        )


def _data(carrier: Carrier, infos: Mapping[str, Any] | None, folder: str, *, raw: bool) -> None:
    carrier.take("dataset_dir")
    given, tests = carrier.take("dataset"), carrier.take("eval_dataset")
    shares = _shares(carrier)
    if given:
        names = names_in(given.value) or []
        rows = [_rows(carrier, given, name, infos, folder, raw=raw) for name in names]
        for one, share in zip(rows, shares, strict=False):
            one.weight = share
        carry_rows(carrier, given, rows)
    if tests:
        names = names_in(tests.value) or [""]
        first = _rows(carrier, tests, names[0], infos, folder, raw=raw)
        carrier.put("data.eval_path", first.word, tests, "the first of them" if len(names) > 1 else "")
    if most := carrier.take("max_samples"):
        carrier.leave(
            most, "all rows are used: data.sources draws a number of rows of each, and repeats a smaller file"
        )


def _shares(carrier: Carrier) -> list[float]:
    """Return the weights of a mixture; none where all rows of all data sets are used."""
    how, given = carrier.take("mix_strategy"), carrier.take("interleave_probs")
    parts = [as_number(part) for part in (names_in(given.value) or [])] if given else []
    if how and how.value == "interleave_over":
        carrier.leave(how, "no row with a weight is used twice: the data set that runs out first ends the mixture")
    return [float(part) for part in parts if isinstance(part, int | float)]


def _rows(
    carrier: Carrier, given: Setting, name: str, infos: Mapping[str, Any] | None, folder: str, *, raw: bool
) -> Rows:
    """Return what a data set's name means."""
    info = infos.get(name) if infos is not None else None
    if not isinstance(info, Mapping):
        why = "dataset_info.json was not found" if infos is None else "dataset_info.json does not know it"
        carrier.leave(Setting(given.key, name, given.line), f"{why}: name its file in data.path (or give --data)")
        return Rows(name)
    hub = info.get("hf_hub_url") or info.get("ms_hub_url")
    place = str(hub or info.get("file_name") or info.get("script_url") or name)
    rows = Rows(place if hub else f"{folder}/{place}" if folder else place, str(info.get("subset") or ""))
    with_split(carrier, rows, Setting(f"{name}: split", info.get("split") or "", given.line))
    if isinstance(number := info.get("num_samples"), int) and number > 0:
        rows.rows = number
    told = info.get("columns")
    columns = dict(told) if isinstance(told, Mapping) else {}
    if raw:
        rows.format, rows.columns = "text", {"text": str(columns.get("prompt", "instruction"))}
    else:
        marks = info.get("tags")
        tags = dict(marks) if isinstance(marks, Mapping) else {}
        rows.columns = {ours: str(columns[theirs]) for theirs, ours in _COLUMNS.items() if columns.get(theirs)}
        rows.columns |= {ours: str(tags[theirs]) for theirs, ours in _TAGS.items() if tags.get(theirs)}
    pictures = [word for word in _PICTURES if columns.get(word)]
    if pictures:
        carrier.leave(Setting(f"{name}: {', '.join(pictures)}", True, given.line), "text alone is trained")
    return rows
