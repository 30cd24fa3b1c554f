"""What the tools share: transformers' TrainingArguments, peft's LoraConfig and bitsandbytes' 4 bits, by their names."""

from collections.abc import Mapping
from typing import Any

from studio.core.errors import StudioError
from studio.core.foreign.carry import (
    Carrier,
    Setting,
    Unread,
    as_number,
    as_switch,
    is_off,
    names_in,
)
from studio.core.layer_precision import EVERYTHING, INT8, SIXTEEN_BIT
from studio.core.named_templates import NAMED
from studio.core.value_kinds import ALL_LINEAR, is_module

_OPTIMIZERS = {
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "ao_adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw": "paged_adamw_32bit",
}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
"""What our AdamW takes: PyTorch's and bitsandbytes' own defaults, and transformers'."""
_TEMPLATES = {"llama-3": "llama3", "phi_3": "phi3", "phi-3": "phi3", "phi": "phi3", "mistral_v1": "mistral"}
_STARTS = {"gaussian": "gaussian", "pissa": "pissa", "loftq": "loftq", "true": "default"}

TRAINED_ALONE = "dpo and orpo are the objectives beside supervised training here"
OWN_TEMPLATE = "the model's own chat template is used; data.template takes another"


def carry_training(carrier: Carrier, defaults: Mapping[str, Any]) -> None:
    """Carry what transformers' TrainingArguments name.

    Args:
        carrier: The settings.
        defaults: What the tool does where nothing is said, by field of the recipe.
    """
    carrier.move("per_device_train_batch_size", "train.micro_batch")
    carrier.move("gradient_accumulation_steps", "train.accumulation")
    carrier.move("learning_rate", "train.learning_rate")
    carrier.move("weight_decay", "train.weight_decay")
    carrier.move("max_grad_norm", "train.max_grad_norm")
    carrier.move("seed", "train.seed")
    carrier.move("num_train_epochs", "train.epochs")
    if (steps := carrier.take("max_steps")) and not _below_one(steps):
        carrier.put("train.steps", steps.value, steps)
    if optimizer := carrier.take("optim"):
        _choice(
            carrier,
            "train.optimizer",
            optimizer,
            _OPTIMIZERS,
            "the optimizers are forms of AdamW; adamw_torch is taken",
        )
    _schedule(carrier)
    _checkpointing(carrier)
    if compiled := carrier.take("torch_compile"):
        carrier.put("train.compile", as_switch(compiled.value) is True, compiled)
    if (grouped := carrier.take("group_by_length")) is not None:
        carrier.put("train.group_by_length", as_switch(grouped.value), grouped)
    if (how := carrier.take("train_sampling_strategy")) is not None:
        carrier.put("train.group_by_length", how.value == "group_by_length", how)
    for name, ours in _ADAM.items():
        if (given := carrier.take(name)) and as_number(given.value) != ours:
            carrier.leave(given, f"AdamW takes {ours:g} here")
    carry_dtype(carrier)
    _saving(carrier)
    _evaluation(carrier)
    for path, value in defaults.items():
        carrier.otherwise(path, value)


def carry_dtype(carrier: Carrier) -> None:
    """Carry the type of the 16-bit weights and sums; what only the card would tell is `auto`, which asks it too."""
    words = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16", "float": "fp32", "auto": "auto"}
    for name, dtype in (
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("pure_bf16", "bf16"),
        ("bfloat16", "bf16"),
        ("float16", "fp16"),
    ):
        if (given := carrier.take(name)) and as_switch(given.value) is True and "model.dtype" not in carrier.carried:
            carrier.put("model.dtype", dtype, given)
    for name in ("torch_dtype", "dtype"):
        given = carrier.take(name)
        if given is not None and "model.dtype" not in carrier.carried:
            word = words.get(str(given.value).rpartition(".")[2])
            if word:
                carrier.put("model.dtype", word, given)
            elif not isinstance(given.value, Unread):
                carrier.leave(given, "model.dtype takes bf16, fp16, fp32 or auto")


def carry_adapter(carrier: Carrier) -> None:
    """Carry what peft's LoraConfig names, with `lora_` before what would mean something else outside of it."""
    carrier.move("lora_r", "adapter.rank")
    carrier.move("lora_alpha", "adapter.alpha")
    carrier.move("lora_dropout", "adapter.dropout")
    linear = carrier.take("lora_target_linear")
    if linear and as_switch(linear.value) is True:
        carrier.put("adapter.targets", ALL_LINEAR, linear)
    if (targets := carrier.take("lora_target_modules")) and "adapter.targets" not in carrier.carried:
        _targets(carrier, targets)
    if whole := carrier.take("lora_modules_to_save"):
        carrier.put("adapter.modules_to_save", names_in(whole.value) or whole.value, whole)
    for name, path in (("use_rslora", "adapter.rslora"), ("use_dora", "adapter.dora")):
        if (given := carrier.take(name)) is not None:
            carrier.put(path, as_switch(given.value), given)
    if layers := carrier.take("layers_to_transform"):
        carrier.put(
            "adapter.layers", layers.value if isinstance(layers.value, list | tuple) else [layers.value], layers
        )
    carrier.move("rank_pattern", "adapter.rank_pattern")
    carrier.move("alpha_pattern", "adapter.alpha_pattern")
    carrier.move("loraplus_lr_ratio", "adapter.lora_plus_ratio")
    start = carrier.take("init_lora_weights")
    if start is not None:
        word = str(start.value).lower()
        if word.startswith("pissa_niter"):
            carrier.put("adapter.init", "pissa", start, "by an exact decomposition, not by iterations")
        else:
            _choice(carrier, "adapter.init", start, _STARTS, "adapters start by default, gaussian, pissa or loftq")
    if (loftq := carrier.take("loftq_config")) is not None and not is_off(loftq.value):
        carrier.put("adapter.init", "loftq", loftq)
    bias = carrier.take("bias")
    if bias is not None and bias.value != "none":
        carrier.leave(bias, "biases of the base stay as they are")


def carry_four_bits(carrier: Carrier) -> None:
    """Carry how the frozen base is held: `load_in_4bit` makes QLoRA of LoRA."""
    four, eight = carrier.take("load_in_4bit"), carrier.take("load_in_8bit")
    kind, double = carrier.take("bnb_4bit_quant_type"), carrier.take("bnb_4bit_use_double_quant")
    double = double or carrier.take("use_bnb_nested_quant")
    if four and as_switch(four.value) is True:
        carrier.put("method", "qlora", four)
        if kind:
            carrier.put("model.quant_type", kind.value, kind)
        if double:
            carrier.put("model.double_quant", as_switch(double.value), double)
        carry_precision(carrier)
    elif eight and as_switch(eight.value) is True:
        carrier.put("method", "qlora", eight, "held as model.precision says")
        carry_precision(carrier, eight)
    elif isinstance(getattr(four, "value", None), Unread) and four:
        carrier.leave(four, "method is qlora, the default")


def carry_precision(carrier: Carrier, eight: Setting | None = None) -> None:
    """Carry what stays in 16 bit of a quantised base.

    Args:
        carrier: The settings.
        eight: What says that the base is in 8 bits; None where it is in 4.
    """
    kept = carrier.take("llm_int8_skip_modules")
    names = None if kept is None else names_in(kept.value)
    if kept is not None and names is None and not is_off(kept.value):
        carrier.leave(kept, "model.precision takes names of modules")
    table = dict.fromkeys(names or (), SIXTEEN_BIT) | ({EVERYTHING: INT8} if eight else {})
    if table:
        note = "weights in 8 bits; activations stay in 16, unlike in LLM.int8()" if eight else ""
        carrier.put("model.precision", table, eight or kept, note)


def carry_attention(carrier: Carrier, asked: Setting | None, word: Any) -> None:
    """Carry the way attention is computed: sdpa in place of kernels of other packages, which compute the same."""
    if asked is None:
        return
    if word == "eager":
        carrier.put("train.attention", "eager", asked)
    elif word in ("sdpa", "auto"):
        carrier.put("train.attention", "sdpa", asked)
    else:
        note = "computes the same and needs no package; train.attention takes flash_attention_2 where it is installed"
        carrier.put("train.attention", "sdpa", asked, note)


def carry_template(carrier: Carrier, given: Setting, word: Any) -> None:
    """Carry the name of a chat template where one of ours is the same format."""
    name = _TEMPLATES.get(str(word), str(word))
    if name in NAMED:
        carrier.put("data.template", name, given)
    else:
        carrier.leave(given, OWN_TEMPLATE)


def refuse_objective(tool: str, word: str) -> StudioError:
    """Return the refusal of a training that has no place here."""
    return StudioError(f"this {tool} configuration trains by {word}, which this program does not do: {TRAINED_ALONE}.")


def _choice(carrier: Carrier, path: str, given: Setting, words: Mapping[str, str], otherwise: str) -> None:
    word = words.get(str(given.value).lower().rpartition(".")[2])
    if word:
        carrier.put(path, word, given)
    else:
        carrier.leave(given, otherwise)


def _schedule(carrier: Carrier) -> None:
    """Carry the schedule and the warm-up, which transformers' `constant` does not have."""
    kind = carrier.take("lr_scheduler_type")
    if kind:
        _choice(carrier, "train.schedule", kind, _SCHEDULES, "the schedules are cosine, linear and constant")
    share, steps = carrier.take("warmup_ratio"), carrier.take("warmup_steps")
    if kind and kind.value == "constant":
        carrier.put("train.warmup_fraction", 0.0, kind, "there, constant has no warm-up")
    elif steps and _below_one(steps):
        carrier.put("train.warmup_fraction", steps.value, steps)
    elif steps:
        total, wanted = carrier.carried.get("train.steps"), as_number(steps.value)
        if total and isinstance(wanted, int | float):
            carrier.put("train.warmup_fraction", min(1.0, wanted / total.value), steps)
        else:
            carrier.leave(
                steps, "the warm-up is a share of the steps here, and how many there are follows from the data"
            )
            carrier.otherwise("train.warmup_fraction", 0.03)
    elif share:
        carrier.put("train.warmup_fraction", share.value, share)


def _checkpointing(carrier: Carrier) -> None:
    for name in ("gradient_checkpointing", "use_gradient_checkpointing", "activation_checkpointing"):
        if (given := carrier.take(name)) is not None and not isinstance(given.value, Unread):
            carrier.put("train.recompute", "none" if as_switch(given.value) is False else "all", given)
            if given.value in ("unsloth", "offload", "offload_disk"):
                carrier.put("train.offload_checkpoints", True, given)
    if (given := carrier.take("disable_gradient_checkpointing")) is not None:
        carrier.put("train.recompute", "none" if as_switch(given.value) is True else "all", given)
    if (given := carrier.take("activation_offloading")) and as_switch(given.value) is not False:
        carrier.put("train.offload_checkpoints", True, given)


def _saving(carrier: Carrier) -> None:
    strategy, steps = carrier.take("save_strategy"), carrier.take("save_steps")
    if strategy and str(strategy.value) == "no":
        carrier.put("train.checkpoint_every", 0, strategy)
        carrier.put("train.checkpoint_minutes", 0, strategy)
    elif steps and not _below_one(steps):
        carrier.put("train.checkpoint_every", steps.value, steps)
    elif steps or (strategy and str(strategy.value) not in ("steps",)):
        carrier.leave(steps or strategy, "checkpoints are counted in steps: train.checkpoint_every", matters=False)  # type: ignore[arg-type]
    if each := carrier.take("saves_per_epoch"):
        carrier.leave(each, "checkpoints are counted in steps: train.checkpoint_every", matters=False)
    carrier.move("save_total_limit", "train.keep_checkpoints")


def _evaluation(carrier: Carrier) -> None:
    """Carry when it is evaluated; what is held out, the tools say in their own ways."""
    strategy = carrier.take("eval_strategy") or carrier.take("evaluation_strategy")
    steps, each = carrier.take("eval_steps"), carrier.take("evals_per_epoch")
    if steps and not _below_one(steps):
        carrier.put("eval.every", steps.value, steps)
    else:
        for given in (steps, each, strategy):
            if given and str(given.value) not in ("no", "steps"):
                carrier.leave(given, "evaluations are counted in steps: eval.every", matters=False)


def _targets(carrier: Carrier, given: Setting) -> None:
    names = names_in(given.value)
    if given.value in ("all-linear", "all_linear", "all"):
        carrier.put("adapter.targets", ALL_LINEAR, given)
    elif names and all(map(is_module, names)):
        carrier.put("adapter.targets", names, given)
    else:
        carrier.leave(given, "module names are taken, no pattern of them: adapter.targets is all-linear")


def _below_one(given: Setting) -> bool:
    number = as_number(given.value)
    return isinstance(number, int | float) and number < 1
