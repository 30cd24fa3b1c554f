"""What a small file teaches the embedded model, by learning rate, passes and rows a step.

`python -m tests.bench.few_rows FOLDER` runs the training job itself on each setting that `few_rows.jsonl` has no line
for yet, adds a line as each ends, and writes `few_rows_results.md` of all lines. It can be stopped and started again.
FOLDER gets the runs and the converted model. `studio.core.advice` advises from these figures.
"""

import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOUND, RESULTS = HERE / "few_rows.jsonl", HERE / "few_rows_results.md"
STDLIB = HERE.parents[1] / "recipes" / "data" / "stdlib_qa.jsonl"
HELD_OUT = 32
"""Rows that every setting is measured on; none of them is trained on."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One training: the task, how many rows are learnt from and how, and the seed of rows, adapter and order."""

    task: str
    rows: int
    epochs: int
    rows_per_step: int
    rate: float
    seed: int


_SYSTEM = {"docstrings": "Explain Python.", "orders": "Answer in JSON."}
SHORT, LONGER, WIDER, MANY = (45, 3, 16), (45, 3, 4), (150, 1, 4), (150, 3, 8)
"""Rows, passes and rows a step: 9, 34, 38 and 57 steps. 45 rows are a file of 60 without the rows that it holds out."""


def settings() -> Iterator[Setting]:
    """Yield all settings, those that say most first."""
    blocks: tuple[tuple[str, tuple[int, int, int], tuple[float, ...], tuple[int, ...]], ...] = (
        ("docstrings", SHORT, (1e-3, 3e-4, 2e-3), (1,)),
        ("docstrings", SHORT, (1e-3, 3e-4, 2e-3), (2,)),
        ("docstrings", LONGER, (1e-3, 3e-4), (1,)),
        ("docstrings", WIDER, (1e-3, 3e-4), (1,)),
        ("docstrings", LONGER, (2e-3,), (1,)),
        ("docstrings", WIDER, (2e-3,), (1,)),
        ("docstrings", SHORT, (4e-3,), (1, 2)),
        ("docstrings", LONGER, (1e-3, 2e-3, 3e-4), (2,)),
        ("docstrings", WIDER, (1e-3, 2e-3, 3e-4), (2,)),
        ("orders", SHORT, (2e-3, 3e-4, 1e-3, 4e-3), (1, 2)),
        ("docstrings", MANY, (1e-3, 2e-3, 3e-4, 4e-3), (1, 2)),
        ("orders", LONGER, (1e-3, 3e-4, 2e-3), (1, 2)),
        ("docstrings", SHORT, (1e-4, 1e-2), (1, 2)),
    )
    for task, (rows, epochs, rows_per_step), rates, seeds in blocks:
        for seed in seeds:
            for rate in rates:
                yield Setting(task, rows, epochs, rows_per_step, rate, seed)


def rows_of(task: str) -> list[dict[str, Any]]:
    """Return all rows of a task as chats, in a fixed order.

    Their system line is shorter than the one that the template would write: the grid takes a quarter less time.
    """
    if task == "docstrings":
        rows = [json.loads(line) for line in STDLIB.read_text(encoding="utf-8").splitlines()]
    else:
        rows = list(_orders())
    random.Random(0).shuffle(rows)  # noqa: S311  no secret
    system = {"role": "system", "content": _SYSTEM[task]}
    return [{"messages": [system, *row["messages"]]} for row in rows]


def _orders() -> Iterator[dict[str, Any]]:
    """Yield orders in prose and as a line of JSON: a form that is learnt rather than facts."""
    draw = random.Random(0)  # noqa: S311
    things = ("kettles", "lamps", "chairs", "notebooks", "blankets", "bicycles", "cups", "radios", "ladders", "carpets")
    names = ("Ada", "Boris", "Chen", "Dolores", "Emeka", "Farida", "Gustav", "Hana", "Ivo", "Jun", "Kemal", "Lucia")
    towns = ("Lyon", "Porto", "Graz", "Bergen", "Quito", "Osaka", "Tunis", "Perth", "Leeds", "Izmir", "Pune", "Turku")
    forms = (
        "{name} from {town} wants {count} {thing}, and is in a hurry: {soon}.",
        "Please send {count} {thing} to {town}. The name is {name}. Express: {soon}.",
        "Hello, this is {name}. Could you bring {count} {thing} to us in {town}? Express delivery? {soon}!",
    )
    seen = set[str]()
    while len(seen) < HELD_OUT + 200:
        soon = draw.choice((True, False))
        order = {
            "item": draw.choice(things), "count": draw.randint(2, 60), "customer": draw.choice(names),
            "city": draw.choice(towns), "express": soon,
        }  # fmt: skip
        said = draw.choice(forms).format(
            name=order["customer"], town=order["city"], count=order["count"], thing=order["item"],
            soon="yes" if soon else "no",
        )  # fmt: skip
        if said not in seen:
            seen.add(said)
            turns = (("user", said), ("assistant", json.dumps(order)))
            yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def measured(setting: Setting, folder: Path) -> dict[str, Any]:
    """Train as a setting says, in this process, and return what its log tells."""
    from studio.core.recipe import Recipe
    from studio.jobs.train.job import train_run
    from studio.runs.history import History
    from studio.runs.job import write_job
    from studio.runs.job_process import run_job
    from studio.runs.layout import RunPaths
    from studio.runs.log import read_events

    rows = rows_of(setting.task)
    held_out, rest = rows[:HELD_OUT], rows[HELD_OUT:]
    chosen = random.Random(setting.seed).sample(rest, setting.rows)  # noqa: S311
    folder.mkdir(parents=True)
    for name, some in (("rows", chosen), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    micro_batch = min(8, setting.rows_per_step)
    fields = {
        "method": "lora", "model.base": "embedded", "adapter.rank": 16, "adapter.alpha": 32.0,
        "data.path": str(folder / "rows.jsonl"), "data.eval_path": str(folder / "held_out.jsonl"),
        "train.seq_len": 256, "train.micro_batch": micro_batch,
        "train.accumulation": setting.rows_per_step // micro_batch, "train.epochs": float(setting.epochs),
        "train.learning_rate": setting.rate, "train.packing": "off", "train.recompute": "none",
        "train.seed": setting.seed, "train.checkpoint_every": 0, "eval.rows": 0, "eval.every": 0, "eval.samples": 0,
    }  # fmt: skip
    recipe = Recipe(name="few-rows")
    for path, value in fields.items():
        recipe = recipe.with_(path, value)
    paths = RunPaths(folder / "run")
    paths.root.mkdir()
    write_job(paths, recipe)
    began = time.process_time()
    if run_job(paths.root, lambda worker: train_run(worker, recipe)):
        raise RuntimeError(f"the training broke: {paths.events.read_text(encoding='utf-8')[-2000:]}")
    history = History()
    history.fold(read_events(paths.events))
    if history.finished is None or history.finished.outcome != "done":
        raise RuntimeError(f"the training ended before its last step, at step {history.last_step}")
    first, last = history.evals[0], history.evals[-1]
    return asdict(setting) | {
        "steps": history.last_step, "before": first.loss, "after": last.loss, "gain": last.gain,
        "held_out_rows": last.rows, "held_out_tokens": last.loss_tokens, "day": time.strftime("%Y-%m-%d"),
        "processor_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


def found() -> list[dict[str, Any]]:
    """Return all kept lines."""
    return [json.loads(line) for line in FOUND.read_text(encoding="utf-8").splitlines()] if FOUND.exists() else []


def gains(lines: Sequence[Mapping[str, Any]], task: str) -> dict[tuple[int, int, int], dict[float, list[Any]]]:
    """Return the lines of a task by rows, passes and rows a step, then by rate."""
    ordered: dict[tuple[int, int, int], dict[float, list[Any]]] = {}
    for line in sorted(lines, key=lambda line: (line["steps"], line["rows"], line["rate"], line["seed"])):
        if line["task"] == task:
            shape = (line["rows"], line["epochs"], line["rows_per_step"])
            ordered.setdefault(shape, {}).setdefault(line["rate"], []).append(line)
    return ordered


_ABOUT = """# What few rows teach the embedded model

Written by `python -m tests.bench.few_rows`: the training job itself on SmolLM2-135M-Instruct in bf16 on one core,
LoRA of rank 16 and alpha 32 on all linear layers, cosine after a warm-up of 3 %, the same {held} held-out rows for all.
A figure is the held-out loss after training minus that before it, in nats a token, paired row by row, with its 95 %
interval; a seed chooses rows, adapter and order. Measured on {days}, on a machine shared with much other work: the
seconds mean nothing. `studio/core/advice.py` advises from these figures, for models of this size only.
"""


def results(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return all lines as Markdown."""
    days = sorted({line["day"] for line in lines})
    parts = [_ABOUT.format(held=HELD_OUT, days=" and ".join(days))]
    for task in dict.fromkeys(line["task"] for line in lines):
        parts.append(f"## {task}\n\n| rows | passes | rows a step | steps | rate | mean | by seed |\n{'|---' * 7}|")
        for (rows, epochs, rows_per_step), by_rate in gains(lines, task).items():
            for rate, some in by_rate.items():
                seeds = "; ".join(
                    f"{line['seed']}: {line['gain']['value']:+.3f} ({line['gain']['low']:+.3f} to "
                    f"{line['gain']['high']:+.3f})"
                    for line in some
                )
                mean = statistics.fmean(line["gain"]["value"] for line in some)
                cells = (rows, epochs, rows_per_step, some[0]["steps"], f"{rate:g}", f"{mean:+.3f}", seeds)
                parts.append(f"| {' | '.join(map(str, cells))} |")
        parts.append("")
    return "\n".join(parts)


def main(place: Path) -> None:
    """Measure what is not measured yet."""
    os.environ["LORA_STUDIO_HOME"] = str(place / "home")
    import torch

    torch.set_num_threads(1)
    keys = tuple(Setting.__dataclass_fields__)
    known = {tuple(line[key] for key in keys) for line in found()}
    for setting in settings():
        if tuple(asdict(setting).values()) in known:
            continue
        folder = place / "one"
        shutil.rmtree(folder, ignore_errors=True)
        line = measured(setting, folder)
        with FOUND.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        RESULTS.write_text(results(found()), encoding="utf-8")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
