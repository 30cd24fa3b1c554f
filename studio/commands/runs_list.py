"""`lora-studio runs list`: all runs, from the ends of their logs."""

import argparse
import math
import time
from typing import Any

from studio.commands.options import root_of
from studio.commands.terminal import DONE, number, say, table, write_json
from studio.core.text import plain
from studio.runs.status import Status
from studio.runs.store import RunInfo, list_runs


def list_all(args: argparse.Namespace) -> int:
    """List all runs, newest first."""
    infos = list_runs(root_of(args))
    if args.json:
        write_json([_listed(info) for info in infos])
    elif not infos:
        say(f"no runs in {plain(str(root_of(args)), one_line=True)}")
    else:
        say(
            table(
                [["run", "status", "method", "model", "step", "loss", "held-out", "started", "note"], *map(_row, infos)]
            )
        )
    return DONE


def _listed(info: RunInfo) -> dict[str, Any]:
    return {
        "run": info.name,
        "path": str(info.paths.root),
        "status": str(info.status),
        "job": info.job,
        "method": info.method,
        "model": info.model,
        "step": info.last_step,
        "total_steps": info.total,
        "loss": _finite(info.last_loss),
        "eval_loss": _finite(info.eval_loss),
        "started_at": info.started_at,
        "note": info.note,
    }


def _row(info: RunInfo) -> list[str]:
    started = "" if info.started_at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(info.started_at))
    done = f"{info.last_step or 0}/{info.total}" if info.total else str(info.last_step or "")
    crashed = info.status is Status.crashed
    return [
        info.name,
        f"{info.status}{' !' if crashed else ''}",
        info.method or info.job or "",
        plain(info.model or "", one_line=True, limit=40),
        done,
        number(info.last_loss),
        number(info.eval_loss),
        started,
        plain(info.note, one_line=True, limit=40),
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
