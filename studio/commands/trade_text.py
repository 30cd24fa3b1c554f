"""`plan --trade`: LoRA beside QLoRA and what lies between, as lines and as plain values."""

from dataclasses import asdict
from typing import Any

from studio.commands.terminal import size, table
from studio.core.placement.columns import Column, kept_layers
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape
from studio.probe.forecast import Forecaster
from studio.probe.machine import ram_bytes
from studio.probe.pace import calibrated
from studio.probe.plan import PlanDevice
from studio.probe.trade import Side, Sides, sides_of


def trade_of(recipe: Recipe, shape: ModelShape, device: PlanDevice) -> Sides:
    """Return the columns of a recipe on a device.

    Args:
        recipe: What is planned.
        shape: Its model.
        device: The card, or the CPU.

    Raises:
        BadInput: The recipe cannot be estimated.
    """
    return sides_of(recipe, Forecaster(shape, device, calibrated, ram_bytes()), batches=True)


def trade_to_list(sides: Sides) -> list[dict[str, Any]]:
    """Return the columns as `plan --trade --json` holds them; null is "not known", or "not measured"."""
    return [_to_dict(column, side) for column, side in sides.items()]


def _to_dict(column: Column, side: Side) -> dict[str, Any]:
    outlook, recipe, pace = side.outlook, side.recipe, side.pace
    return {
        "column": column,
        "recipe": {
            "method": recipe.method,
            "model.stream": recipe.model.stream,
            "model.precision": dict(recipe.model.precision),
        },
        "device": asdict(outlook.estimate.device) if outlook else None,
        "host_bytes": side.host_bytes,
        "verdict": side.verdict or None,
        "largest_micro_batch": side.largest,
        "tokens_per_second": asdict(pace.speed) if pace and pace.speed else None,
        "fidelity": fidelity_of(column, side),
        "loss_above_lora": side.measured.more.value if side.measured else None,
    }


def fidelity_of(column: Column, side: Side) -> str:
    """Return what is known of a column's quality beside LoRA's: measured in a race, the same arithmetic, or nothing."""
    if column in ("lora", "streamed"):
        return "the reference" if column == "lora" else "as LoRA"
    return f"{side.measured.more.value:+.3f} nats a token" if side.measured else "not measured"


def trade_table(sides: Sides) -> str:
    """Return the columns as rows: a terminal has more room below than beside."""
    rows = [["the trade", "VRAM", "range", "main memory", "fits", "tokens/s", "fidelity"]]
    for column, side in sides.items():
        if side.outlook is None:
            continue
        device, speed = side.outlook.estimate.device, side.pace.speed if side.pace else None
        rows.append(
            [
                _named(column, side),
                size(device.expected),
                f"{size(device.low)} to {size(device.high)}",
                size(side.host_bytes) if side.host_bytes else "-",
                side.verdict or "-",
                f"{speed.low:.0f} to {speed.high:.0f}" if speed else "not known",
                fidelity_of(column, side),
            ]
        )
    return table(rows)


def _named(column: Column, side: Side) -> str:
    if column == "streamed":
        return f"LoRA, {side.recipe.model.stream} layers streamed"
    if column == "mixed":
        return f"QLoRA, {kept_layers(side.recipe) or 'some'} layers in 16 bit"
    return "LoRA" if column == "lora" else "QLoRA"
