"""Published measurements beside our estimates, like with like: each row's own loop, as far as its source says.

The rows (tests/data/published_vram.jsonl) were taken from public benchmark archives; `source` names each. Rows of
engines that neither of ours describes are kept in the table and in no statistic.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from studio.core.gpu_catalogue import Gpu, find_gpu
from studio.core.shape import ModelShape
from studio.core.shape_from_config import shape_from_config
from studio.core.stock.estimate import estimate_stock, refined
from studio.core.stock.setup import StockSetup, stock_setup
from studio.core.vram.report import VramEstimate
from tests.core.published_reasons import reason

DATA = Path(__file__).parents[1] / "data"
GIB = 2**30
PEFT_LONGEST_BATCH = 757
"""Tokens of the longest batch of the peft rows, inferred from their LoRA-FA run (LoRA minus LoRA-FA, per token)."""

_OURS = {"wte": "embed_tokens"}


@dataclass(frozen=True)
class Compared:
    """A row with our estimate; `unlike` says why the row describes another engine, empty where it does not."""

    row: dict[str, Any]
    setup: StockSetup
    estimate: VramEstimate
    unlike: str

    def error(self, metric: str) -> float | None:
        """Return predicted / measured - 1 for `allocated`, `reserved` or `device`; None where it was not measured."""
        measured = measured_bytes(self.row, metric)
        return None if measured is None else getattr(self.estimate, metric).expected / measured - 1


def measured_bytes(row: dict[str, Any], metric: str) -> float | None:
    """Return a row's measurement of one metric in bytes."""
    if metric == "allocated":
        gib = row["measured_gib"] if "max_memory_allocated" in row["metric"] else None
    elif metric == "reserved":
        gib = row["measured_gib"] if "max_memory_reserved" in row["metric"] else row.get("reserved_gib")
    else:
        gib = row.get("device_gib")
    return None if gib is None else gib * GIB


@lru_cache
def shapes() -> dict[str, ModelShape]:
    """Return the models of the rows, from their config.json."""
    configs = json.loads((DATA / "model_configs.json").read_text(encoding="utf-8"))
    return {name: shape_from_config(config) for name, config in configs.items()}


def published() -> list[dict[str, Any]]:
    """Return all rows."""
    lines = (DATA / "published_vram.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@lru_cache
def compared() -> tuple[Compared, ...]:
    """Return every row with the estimate for its own loop."""
    return tuple(_compare(row) for row in published() if row["model"] in shapes())


def stock_default(row: dict[str, Any]) -> StockSetup:
    """Return what somebody gets who knows of a row only its flags: `plan --engine hf` and its defaults."""
    kbit = row["method"] == "qlora" and bool(row.get("kbit_prepare"))
    said = replace(_setup(row), dropout=0.0, attention=row["attention"])
    return stock_setup(said, kbit_prepare=kbit, gpu=card(row))


def _compare(row: dict[str, Any]) -> Compared:
    setup, shape = _setup(row), shapes()[row["model"]]
    return Compared(row, setup, planned(shape, setup, card(row)), reason(row))


def planned(shape: ModelShape, setup: StockSetup, gpu: Gpu | None) -> VramEstimate:
    """Return the estimate as `lora-studio plan` makes it."""
    return refined(estimate_stock(shape, setup, gpu), shape, setup, gpu)


@lru_cache
def from_flags() -> tuple[tuple[Compared, VramEstimate], ...]:
    """Return every row of class A that is like one of our engines, with what its flags alone give."""
    sure = [item for item in compared() if not item.unlike and item.row["completeness"] == "A"]
    return tuple((item, planned(shapes()[item.row["model"]], stock_default(item.row), card(item.row))) for item in sure)


def card(row: dict[str, Any]) -> Gpu | None:
    """Return the row's card."""
    name = row["gpu"]
    gpu = None if name == "unspecified" else find_gpu(name)
    if (
        gpu
        and gpu.compute_capability >= (8, 0)
        and row["kernel"] == "sdpa"
        and not row["packed"]
        and row["micro_batch"] > 1
    ):
        # Padded rows bring a mask, with which there is no flash: the kernel of an older card.
        return replace(gpu, compute_capability=(7, 5))
    return gpu


def _setup(row: dict[str, Any]) -> StockSetup:
    quantised = row["method"] == "qlora"
    chunked = "axolotl" in row["framework"] or "litgpt" in row["framework"] or "lit-gpt" in row["framework"]
    chunked = chunked or "liger" in row.get("framework_config", "")
    padded = row["id"].startswith("peft")
    return StockSetup(
        method=row["method"],
        rank=row["rank"],
        targets=_targets(row),
        dropout=row.get("dropout", 0.0),
        dora="dora" in (row.get("variant") or []),
        micro_batch=row["micro_batch"],
        seq_len=PEFT_LONGEST_BATCH if padded else row["seq_len"],
        optimizer=_optimizer(row["optimizer"]),
        recompute="all" if row["grad_checkpointing"] else "none",
        # What the source calls sdpa ran on the flash-attn package, for which no mask is built; and litgpt repeats
        # Falcon's one key head, so that torch's flash takes it.
        attention="flash_attention_2" if _flash(row) else row["attention"],
        loss="chunked" if chunked else "full",
        accumulation=8 if "Qwen" in row["framework"] else 1,
        modules_to_save=tuple(_OURS.get(name, name) for name in row.get("modules_to_save") or ()),
        dtype=row["dtype"],
        double_quant=bool(row["double_quant"]),
        kbit_prepare=quantised and row.get("kbit_prepare", False),
        head_cast_back=quantised
        and bool(row.get("kbit_prepare"))
        and row["dtype"] == "bf16"
        and row["id"].startswith("fms"),
        autocast="autocast" in str(row.get("amp", "")) and not str(row.get("amp")).startswith("none"),
        outputs_kept=row["id"].startswith("fitcheck"),  # a plain loop holds `outputs` through the backward
        transformers=row.get("transformers") or "",
        fused_kernels="foak" if "foak" in row.get("framework_config", "") else "none",
    )


def _flash(row: dict[str, Any]) -> bool:
    return row["kernel"] == "flash_attention_2" or (row["model"] == "falcon-7b" and "litgpt" in row["framework"])


def _optimizer(word: str) -> Any:
    if "32bit" in word:
        return "paged_adamw_32bit"
    return "adamw_8bit" if "8bit" in word or "paged" in word else "adamw_torch"


def _targets(row: dict[str, Any]) -> Any:
    if isinstance(row["targets"], str):
        return "all-linear"
    known = {linear.name for _, linear in shapes()[row["model"]].all_linears()}
    names = tuple(name for name in row["targets"] if name in known)
    return (
        names
        if len(names) == len(row["targets"])
        else ("query_key_value",)
        if "query_key_value" in known
        else "all-linear"
    )
