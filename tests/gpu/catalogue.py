"""The list of the checks, in the order in which they run: the cheap and telling ones first, speed last."""

from tests.gpu.runner import Check

DTYPES = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
STAGES = ("load", "forward", "loss", "backward", "optimizer", "eval", "save")
METHODS = ("lora", "qlora")

IDENTITY = Check(
    "which card, driver and libraries these are", "identity", "tests.gpu.identity:identity", inherited=True
)
PREPARE = Check("models and rows for the checks", "prepare", "tests.gpu.bench:prepare", (), 300)


def _named(part: str, function: str, name: str, *arguments: str, limit: float = 120) -> Check:
    return Check(name, part, f"tests.gpu.{function}", arguments, limit)


CHECKS: tuple[Check, ...] = (
    Check(
        "the card of the plan is the card of the run",
        "identity",
        "tests.gpu.identity:device_chosen",
        limit_seconds=240,
        inherited=True,
    ),
    _named("identity", "identity:context_bytes", "context bytes at three moments"),
    _named("numbers", "numbers:flash_kernel", "packed rows go through one flash kernel"),
    *(
        _named("numbers", "numbers:packed_rows", f"packed rows, {method} {dtype}: loss and gradients", method, dtype)
        for method in METHODS
        for dtype in DTYPES
    ),
    *(
        _named("numbers", "numbers:chunked_loss", f"chunked loss, {dtype}: value and gradients", dtype)
        for dtype in DTYPES
    ),
    *(
        _named("numbers", "numbers:four_bit_products", f"4-bit products, {rows} rows, {dtype}", str(rows), dtype)
        for rows in (1, 8, 64, 512, 2048)
        for dtype in DTYPES
    ),
    _named("train", "training:offloaded_step", "checkpoints on the host: the same gradients"),
    *(
        _named("train", "training:as_on_the_cpu", f"{method} {dtype}: five losses as on the CPU", method, dtype)
        for method in METHODS
        for dtype in DTYPES
    ),
    *(
        _named(
            "train",
            "training:learns",
            f"{name}: the loss halves in 30 steps",
            "train.optimizer",
            name,
        )
        for name in OPTIMIZERS
    ),
    *(
        _named(
            "train", "training:learns", f"{method} {init}: the loss halves in 30 steps", "adapter.init", init, method
        )
        for method, init in (("lora", "pissa"), ("qlora", "loftq"), ("qlora", "gaussian"))
    ),
    *(
        _named("train", "training:packed_as_padded", f"{method}: packed rows have the losses of padded rows", method)
        for method in METHODS
    ),
    *(
        _named("train", "training:overflow", f"{method} fp16: overflowing steps are skipped, then it learns", method)
        for method in METHODS
    ),
    *(
        _named("train", "training:resumed", f"{name}: resumed equals uninterrupted", name, limit=180)
        for name in OPTIMIZERS
    ),
    _named(
        "train",
        "training:switched",
        "liger's loss: the same losses",
        *("loss", "train.loss", "liger", "liger_kernel"),
    ),
    _named(
        "train",
        "training:switched",
        "flash-attn: the same losses",
        *("attention", "train.attention", "flash_attention_2", "flash_attn", "bf16"),
    ),
    _named("train", "training:compiled", "compiled layers: the same losses", limit=300),
    _named("train", "training:offloaded_run", "checkpoints on the host: the same losses in less memory", limit=240),
    *(
        _named("train", "training:streamed_run", f"{method} with streamed layers: the same losses", method, limit=240)
        for method in METHODS
    ),
    *(_named("train", "training:embedded", f"{method} on the embedded model", method, limit=240) for method in METHODS),
    _named("serve", "serving:generation", "generation: the tokens of whole forward passes"),
    *(_named("serve", "serving:chat", f"chat, {method}: both sides answer", method) for method in METHODS),
    *(
        _named("serve", "serving:audit_block", f"one block of an audit, {form}", form)
        for form in ("16-bit", "nf4", "nf4+dq")
    ),
    _named("serve", "serving:audit", "an audit of a base", limit=240),
    *(
        _named(
            "memory",
            "memory:by_stage",
            f"memory by stage: {model}, {method}, {kept}",
            *(model, method, kept),
            limit=240,
        )
        for model, method, kept in (
            ("tiny", "lora", "checkpointing"),
            ("tiny", "qlora", "checkpointing"),
            ("embedded", "lora", "checkpointing"),
            ("embedded", "lora", "no checkpointing"),
            ("embedded", "qlora", "checkpointing"),
            ("embedded", "qlora", "no checkpointing"),
        )
    ),
    _named("memory", "memory:budget_kept", "the memory budget is kept", limit=300),
    *(_named("faults", "memory:full_card", f"a full card: {stage}", stage) for stage in STAGES),
    _named("faults", "training:named_fault", "a device-side assert is named", "assert", "device_assert"),
    _named("faults", "training:named_fault", "bitsandbytes' exit(1) is named", "native", "device_assert"),
    *(_named("speed", "speed:launches", f"launches of a layer, {method}", method) for method in METHODS),
    *(_named("speed", "speed:synchronisations", f"waits of a step, {method}", method) for method in METHODS),
    _named("speed", "speed:optimizer_milliseconds", "milliseconds of the optimizers"),
    *(
        _named(
            "speed",
            "speed:engines",
            f"tokens/s of {method}, {rows} x {times}, beside HF, TRL and Unsloth",
            *(method, rows, times),
            limit=420,
        )
        for method in METHODS
        for rows, times in (("8", "1"), ("1", "8"))
    ),
)

PARTS = tuple(dict.fromkeys((IDENTITY.part, *(check.part for check in CHECKS))))
