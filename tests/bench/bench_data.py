"""Large data: `python -m tests.bench.bench_data [MEGABYTES]`; without a number 20 MB, which takes some minutes.

Processor seconds and wall seconds of turning chats into tokens and labels, beside `datasets.map` with the same
tokenizer, cores and rows; the same again from the cache; and the peak memory of a check of the file and of reading,
splitting and recording it, as a training begins. Says nothing of other machines: compare within one run.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from studio.jobs.base.data import encode_pool
from studio.jobs.base.data.encode import encode_rows
from studio.jobs.base.tokenizer import load_tokenizer
from studio.probe.data import read_data
from studio.probe.embedded_model import find_embedded
from studio.runs.data_cache import data_cache
from studio.runs.home import HOME_VARIABLE, cache_root

SEQ_LEN = 1024
_ROUNDS = 3

_START = """
import sys
from pathlib import Path
from studio.core.recipe import Recipe
from studio.probe.data import read_data
from studio.probe.held_out import hold_out
from studio.probe.resume import RowsFound
recipe = Recipe().with_("data.path", sys.argv[1])
parts = hold_out(recipe, read_data(Path(sys.argv[1])), None)
print(len(RowsFound.of(parts.train, parts.held_out).hashes), "rows to train on")
"""


def write_chats(path: Path, megabytes: int) -> int:
    """Write chats of about 1 KB each, made of the sentences that ship with us; returns how many."""
    rng = random.Random(17)  # noqa: S311
    sentences = [
        word for row in read_data(Path("embedded")).rows for turn in row.turns for word in turn.content.split(". ")
    ]
    count = 0
    with path.open("w") as file:
        while file.tell() < megabytes * 10**6:
            turns = []
            for _ in range(rng.choice((1, 1, 2))):
                turns.append({"role": "user", "content": ". ".join(rng.choices(sentences, k=rng.randint(1, 4)))})
                turns.append({"role": "assistant", "content": ". ".join(rng.choices(sentences, k=rng.randint(4, 16)))})
            file.write(json.dumps({"messages": turns}) + "\n")
            count += 1
    return count


def measured(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return wall seconds, processor seconds of this process and its children, and what the work returns."""

    def used() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(found.ru_utime + found.ru_stime for found in map(resource.getrusage, kinds))

    began, before = time.perf_counter(), used()
    result = work()
    return time.perf_counter() - began, used() - before, result


def by_map(path: Path, folder: Path, tokenizer: Any, cores: int, *, labels: bool) -> int:
    """Return how many rows `datasets.map` tokenises as scripts do it.

    With labels the prompt of the last answer is tokenised too, so that only this answer is learnt; ours labels every
    answer. Without, labels are the ids.
    """

    def ids_of(chats: list[Any], **more: Any) -> Any:
        return tokenizer.apply_chat_template(
            chats, tokenize=True, return_dict=True, truncation=True, max_length=SEQ_LEN, **more
        )["input_ids"]

    def tokenise(rows: dict[str, Any]) -> dict[str, Any]:
        ids = ids_of(rows["messages"])
        if not labels:
            return {"input_ids": ids, "labels": ids}
        prompts = ids_of([chat[:-1] for chat in rows["messages"]], add_generation_prompt=True)
        learnt = [[-100] * len(prompt) + whole[len(prompt) :] for prompt, whole in zip(prompts, ids, strict=True)]
        return {"input_ids": ids, "labels": learnt}

    data = datasets.Dataset.from_json(str(path), cache_dir=str(folder))
    made = data.map(
        tokenise, batched=True, batch_size=encode_pool.CHUNK_ROWS, num_proc=cores, remove_columns=data.column_names,
        load_from_cache_file=False, cache_file_name=str(folder / f"{time.time_ns()}.arrow"),
    )  # fmt: skip
    return len(made)


_PEAK = """
import resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=False).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3, time.perf_counter() - began)
"""
"""A small process between: a child's peak is at least what its parent has at the fork."""


def peak_of(*command: str) -> tuple[float, float]:
    """Return the peak of a process's resident set in MB, and its wall seconds."""
    done = subprocess.run([sys.executable, "-c", _PEAK, *command], capture_output=True, text=True, check=True)
    code, peak, seconds = done.stdout.split()
    if int(code):
        raise SystemExit(f"{command} ended with {code}: {done.stderr}")
    return float(peak), float(seconds)


def main() -> None:
    """Measure and print."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    embedded = find_embedded()
    if embedded is None:
        raise SystemExit("the embedded model is not installed: its tokenizer is used")
    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a job, and as datasets.map wants it with several processes
    models = cache_root() / "models"
    folder = Path(tempfile.mkdtemp(prefix="bench-data-"))
    try:
        tokenizer = load_tokenizer(next(path for path in models.iterdir() if path.is_dir()))
        os.environ[HOME_VARIABLE] = str(folder / "home")
        path, cores = folder / "chats.jsonl", encode_pool.cores()
        rows = write_chats(path, megabytes)
        print(f"{rows} chats, {path.stat().st_size / 1e6:.0f} MB, {cores} cores")

        for name, command in (
            ("lora-studio data check", ("-m", "studio", "data", "check", str(path))),
            ("data check again", ("-m", "studio", "data", "check", str(path))),
            ("read, split, record", ("-c", _START, str(path))),
            ("read, split, record again", ("-c", _START, str(path))),
        ):
            peak, seconds = peak_of(sys.executable, *command)
            print(f"{name:28} peak {peak:6.0f} MB  {seconds:7.1f} s")

        def ours() -> int:
            return len(encode_rows(read_data(path).rows, tokenizer, warn=lambda _: None, seq_len=SEQ_LEN)[0])

        for _ in range(_ROUNDS):
            for entry in data_cache().glob("tokens-*"):
                shutil.rmtree(entry)
            wall, processor, count = measured(ours)
            print(f"encoded {count} examples: {wall:.1f} s, processor {processor:.1f} s")
            for labels in (False, True):
                theirs = measured(partial(by_map, path, folder, tokenizer, cores, labels=labels))
                print(
                    f"  datasets.map {'with' if labels else 'without'} labels: {theirs[0]:.1f} s, processor "
                    f"{theirs[1]:.1f} s: {theirs[0] / wall:.2f} and {theirs[1] / processor:.2f} times ours"
                )
        wall, processor, _ = measured(ours)
        print(f"encoded again, from the cache: {wall:.2f} s, processor {processor:.2f} s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
